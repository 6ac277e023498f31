"""Memory per GPU of every stage, and a rough time per iteration, before anything runs; needs no GPU and no weights.

Memory comes from the real network without content (see unified_rl/memory.py), times from the assumptions that are
printed with them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from unified_rl.config import ConfigError, RunConfig, resolve
from unified_rl.runtime import EXIT_OK, command_parser, format_seconds, run_stage, set_stage

RECIPES = {
    "janus-pro-1b": "gvu_janus_pro_1b", "janus-pro-7b": "gvu_janus_pro_7b", "bagel-7b": "gvu_bagel_7b",
    "janus": "gvu_janus_pro_1b", "bagel": "gvu_bagel_7b",
}  # fmt: skip
EXAMPLE = """\
python -m unified_rl.plan --model janus-pro-7b --nodes 2 --gpus 8 train.micro_batch=8
  python -m unified_rl.plan --model checkpoints/BAGEL-7B-MoT --recipe srum_bagel_7b --tflops 180
  make plan MODEL=bagel-7b NODES=2 GPUS=8"""
GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Assumptions:
    """What a time estimate rests on; of one GPU."""

    tflops: float = 300.0  # reached in matrix products
    bandwidth: float = 2500.0  # GB/s from its memory
    network: float = 50.0  # GB/s to the other GPUs
    prompt_tokens: int = 64
    reply_tokens: int = 400  # that a judge who writes (SRUM) writes of an image


@dataclass(frozen=True)
class Load:
    """What one image costs: numbers of weights that a token passes, and tokens.

    Attributes:
        read, draw: weights that a token passes when the model reads, and when it draws.
        gathered: weights that training gathers on every rank; trained: that it updates.
        cells: tokens of a drawn image; reading: tokens of an image that is read.
        step_bytes: keys and values of one token.
        flow: whether all cells are computed at each of many steps, not one after another.
    """

    read: int
    draw: int
    gathered: int
    trained: int
    cells: int
    reading: int
    step_bytes: int
    flow: bool


def rollout_seconds(load: Load, config: RunConfig, gpus: int, a: Assumptions) -> float:
    """Drawing; a token at a time it is the memory's bandwidth that counts."""
    rollout, size = config.rollout, _size(config)
    guidance = 2 if rollout.guidance_scale != 1 else 1
    images = rollout.groups_per_batch * rollout.group_size
    batches = math.ceil(config.data.prompts_per_iteration / rollout.groups_per_batch / gpus)
    if load.flow:
        drawing = 2 * load.draw * load.cells * rollout.flow.steps * images * guidance / (a.tflops * TERA)
    else:
        rows = images * guidance
        cache = rows * (a.prompt_tokens + load.cells / 2) * load.step_bytes
        drawing = load.cells * _token_seconds(load.draw, rows, size, cache, a)
    plan = rollout.plan_tokens * _token_seconds(load.read, rollout.groups_per_batch, size, 0, a) if rollout.think else 0
    return batches * (drawing + plan)


def _token_seconds(weights: int, rows: int, size: int, cache: float, a: Assumptions) -> float:
    return max(2 * weights * rows / (a.tflops * TERA), (weights * size + cache) / (a.bandwidth * GIGA))


def reward_seconds(load: Load, config: RunConfig, gpus: int, a: Assumptions) -> float:
    """Reading every image once, the judge's replies, and for GRPO a replay under the base weights."""
    images = config.data.prompts_per_iteration * config.rollout.group_size / gpus
    copies = 2 if config.reward.judge == "live" else 1
    flops = 2 * load.read * (load.reading + 2 * a.prompt_tokens) * copies
    if config.policy.objective == "grpo":
        flops += _replay_flops(load, config, _decisions(config) if load.flow else 1, a)
    seconds = images * flops / (a.tflops * TERA)
    if config.reward.method == "srum":
        batches = math.ceil(images / config.reward.batch_size)
        seconds += batches * a.reply_tokens * _token_seconds(load.read, config.reward.batch_size, _size(config), 0, a)
    return seconds


def train_seconds(load: Load, config: RunConfig, gpus: int, a: Assumptions) -> float:
    """Forward and backward of all images, or the gathering of weights where that takes longer."""
    train, policy = config.train, config.policy
    images = math.ceil(config.data.prompts_per_iteration * config.rollout.group_size * train.epochs / gpus)
    steps = 1
    if load.flow and policy.objective == "grpo":
        steps = policy.steps_per_update or _decisions(config)
    passes = (3 if train.scope == "full" else 2) + train.activation_checkpointing
    compute = images * passes * _replay_flops(load, config, steps, a) / (a.tflops * TERA)
    if gpus == 1:
        return compute
    moved = _size(config) * (2 * load.gathered + load.trained) * (gpus - 1) / gpus
    return max(compute, math.ceil(images / train.micro_batch) * moved / (a.network * GIGA))


def _replay_flops(load: Load, config: RunConfig, steps: int, a: Assumptions) -> float:
    guidance = 2 if config.rollout.guidance_scale != 1 and config.policy.objective == "grpo" else 1
    return 2 * load.draw * (load.cells * steps + a.prompt_tokens) * guidance


def _decisions(config: RunConfig) -> int:
    flow = config.rollout.flow
    return flow.sde_window or (flow.sde_before or flow.steps - 1)


def _size(config: RunConfig) -> int:
    return 4 if config.backbone.dtype == "float32" else 2


def load_of(net: object, config: RunConfig) -> Load:
    """What an image costs with this network; `net` is a `memory.Network` whose trained weights are chosen."""
    from unified_rl.memory import NOT_DRAWING

    layers, heads, size = net.language
    flow = net.family == "bagel"
    in_layers = "language_model.model.layers." if flow else "model.language_model.layers."
    read = net.count(lambda name: name.startswith(in_layers) and "_moe_gen" not in name and "lora_" not in name)
    draw = net.count(lambda name: name.startswith(in_layers) and "_moe_gen" in name) if flow else read
    return Load(
        read, draw, net.count(lambda name: not name.startswith(NOT_DRAWING[net.family])),
        sum(p.numel() for p in net.model.parameters() if p.requires_grad), net.grid[0] * net.grid[1],
        net.reading_tokens, 2 * layers * heads * size * _size(config), flow,
    )  # fmt: skip


def plan_text(model: str, config: RunConfig, nodes: int, gpus: int, a: Assumptions) -> str:
    """The whole report.

    Raises:
        ConfigError: no such model or DeepSpeed configuration.
    """
    from unified_rl import memory

    world, prompt = nodes * gpus, a.prompt_tokens
    net = memory.network(model, config.backbone.dtype)
    stages = {
        "rollout": memory.rollout_memory(net, config, prompt),
        "reward": memory.reward_memory(net, config, prompt),
    }
    for scope in ("lora", "full"):
        for recompute in sorted({0.0, config.train.activation_checkpointing, 1.0}):
            settings = replace(config.train, scope=scope, activation_checkpointing=recompute)
            net = memory.network(model, config.backbone.dtype)
            name = f"train {scope}{f', checkpointing {recompute:.0%}' if recompute else ''}"
            chosen = (scope, recompute) == (config.train.scope, config.train.activation_checkpointing)
            stages[name + (" *" if chosen else "")] = memory.train_memory(
                net, replace(config, train=settings), world, prompt
            )
            if chosen:
                load = load_of(net, config)
    parts = ("weights", "gradients", "optimizer", "cache", "activations", "buffers", "peak")
    rows = [("GiB on a GPU", *parts)]
    rows += [(name, *(f"{getattr(m, part) / 2**30:.2f}" for part in parts)) for name, m in stages.items()]
    seconds = {
        "rollout": rollout_seconds(load, config, world, a),
        "reward": reward_seconds(load, config, world, a),
        "train": train_seconds(load, config, world, a),
    }
    times = ", ".join(f"{stage} {format_seconds(value)}" for stage, value in seconds.items())
    return "\n".join([
        f"{model} on {nodes} x {gpus} GPUs: {net.count() / 1e9:.2f} B numbers, {load.trained / 1e6:.1f} M trained (*)",
        *_table(rows),
        "cache: keys and values; buffers: gathered weights and the bucket of gradients; peak: all together. The CUDA",
        "context (about 0.5 GiB), fragmentation (10 to 20 %) and the replies of a judge who writes come on top.",
        f"an iteration: {format_seconds(sum(seconds.values()))} ({times})",
        "assumed: " + ", ".join(f"{f.name} {getattr(a, f.name):g}" for f in fields(a))
        + "; no loading of weights, no files",
    ])  # fmt: skip


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        row[0].ljust(widths[0]) + "".join(f"  {cell.rjust(w)}" for cell, w in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _positive(kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} must be above 0")
        return value

    return parse


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    set_stage("plan")
    parser = command_parser("unified_rl.plan", __doc__, EXAMPLE)
    parser.add_argument("--model", required=True, help="janus-pro-1b, janus-pro-7b, bagel-7b, or a checkpoint folder")
    parser.add_argument("--nodes", type=_at_least_one, default=1)
    parser.add_argument("--gpus", type=_at_least_one, default=8, help="of a node; default 8")
    parser.add_argument("--recipe", metavar="NAME", help="default: GvU of the model's family")
    for f in fields(Assumptions):
        option = f"--{f.name.replace('_', '-')}"
        parser.add_argument(option, type=_positive(type(f.default)), default=f.default, help=f"default {f.default:g}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="configuration values over the recipe's")
    arguments = parser.parse_intermixed_args(argv)
    from unified_rl.memory import family_of

    family = family_of(arguments.model)
    recipe = arguments.recipe or RECIPES.get(arguments.model, RECIPES[family])
    fixed = [f"backbone.path={arguments.model}", "data.prompts=none"]
    config = resolve(recipe, [*fixed, *arguments.overrides])
    if config.backbone.family != family:
        raise ConfigError(f"recipe {recipe} is for {config.backbone.family}, {arguments.model} is a {family}")
    assumptions = Assumptions(**{f.name: getattr(arguments, f.name) for f in fields(Assumptions)})
    print(plan_text(arguments.model, config, arguments.nodes, arguments.gpus, assumptions))
    return EXIT_OK


if __name__ == "__main__":
    run_stage(main)
