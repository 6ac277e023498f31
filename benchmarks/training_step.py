"""One optimiser step against the plain loop: same weights, same batch, gradients compared.

The plain loop keeps the reference model in the process and runs it beside the policy, computes the logits of every
position in fp32 and normalises them all, takes the samples in random order and pads them to the longest, and reads the
image of every text anew. Both sides train LoRA adapters of the same values by AdamW, in micro-batches of the same size.

Images: GRPO on the tokens of G images of a prompt. Ours gets the reference's log-probs from the reward stage, which
computes them where it draws nothing else, so they are no part of the step.
Texts: the Solver's REINFORCE on short answers about images, with the exact divergence from the base model, which both
sides compute in the step.

Time: both sides in one process, by turns. Memory: each side in a process of its own, the most that it held during two
steps above what it held after its imports; on a GPU what was allocated there.

example: python -m benchmarks.training_step --width 512 --layers 4 --side 12 --repeats 3
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_grad
from torch import nn

from benchmarks import measuring
from benchmarks.measuring import Limits, Row
from benchmarks.models import janus
from unified_rl.backbones.base import Sampling
from unified_rl.backbones.janus import JanusBackbone
from unified_rl.backbones.janus_sampling import positions_of
from unified_rl.config import RunConfig
from unified_rl.policy.controllers import KlController, RunningMean
from unified_rl.policy.grpo import grpo_loss
from unified_rl.policy.reinforce import reinforce_loss
from unified_rl.runtime import Ranks
from unified_rl.shapes.questions import random_scene
from unified_rl.shapes.world import render
from unified_rl.train import zero3
from unified_rl.train.batching import micro_batches_per_rank, permuted
from unified_rl.train.drawing import DrawingPath, select_trainable
from unified_rl.train.losses import GrpoUpdate, inputs_of
from unified_rl.train.reading import ReadingPath
from unified_rl.train.samples import IterationData, Sample
from unified_rl.train.text_losses import RoleState, SolverUpdate, padded
from unified_rl.train.texts import TextData, TextSample
from unified_rl.train.update import Updater

RANK, ALPHA = 16, 32
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}
KL = 0.03
# glibc gives freed memory back at once: else a peak is mostly holes, which differ from run to run.
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
Gradients = dict[str, torch.Tensor]


def policy(arguments: Namespace, vocabulary: int, adapted: bool = True) -> JanusBackbone:
    """The model; `adapted` with an adapter that is not zero, else the reference."""
    dtype = getattr(torch, arguments.dtype)
    backbone = janus(
        arguments.width, arguments.layers, arguments.side, arguments.head, vocabulary, arguments.device, dtype
    )
    if adapted:
        backbone.add_lora(RANK, ALPHA)
        generator = torch.Generator().manual_seed(1)
        for name in select_trainable(backbone, "lora", dtype):
            parameter = backbone.model.get_parameter(name)
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return backbone


def configuration(arguments: Namespace) -> RunConfig:
    """Of both sides; the rate is zero, so that every step starts from the same weights."""
    config = RunConfig()
    config.backbone.dtype, config.train.micro_batch = arguments.dtype, arguments.micro_batch
    config.train.learning_rate = config.self_consistency.solver_learning_rate = 0.0
    config.policy.kl_coefficient = KL
    return config


# ---- batches ------------------------------------------------------------------------------------------------------


def image_samples(arguments: Namespace) -> IterationData:
    """G images of each prompt, of random tokens, and what policies near this one might say of them."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    tokens, size = arguments.side**2, 16384
    samples = []
    for group in range(arguments.groups):
        prompt = " and ".join(["a red circle"] * (1 + 3 * group % 8))
        for i in range(arguments.group):
            chance = torch.full((tokens,), -math.log(size)) + 0.3 * torch.randn(tokens, generator=generator)
            tensors = {"actions": torch.randint(size, (tokens,), generator=generator), "log_probs": chance}
            advantage = rng.gauss(0, 1)
            samples.append(Sample(f"{group}_{i}", prompt, tensors, None, chance, 0.0, 0.0, advantage=advantage))
    return IterationData(samples, grouped(samples, arguments.group), Sampling().to_dict(), 0, 0)


def add_reference(arguments: Namespace, data: IterationData) -> None:
    """Put the base model's log-probs into the samples, as the reward stage does."""
    base = policy(arguments, 0, adapted=False)
    for i, sample in enumerate(data.samples):
        prompts, trajectory = inputs_of([sample], base.device)
        with torch.no_grad():
            distribution = base.image_dist(prompts, trajectory, Sampling())
        data.samples[i] = replace(sample, reference=distribution.reference(trajectory.taken)[0].cpu())


def text_samples(arguments: Namespace) -> TextData:
    """Answers to a question on each image, 1 to --tokens random tokens long."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    samples = []
    for group in range(arguments.groups):
        image = render(random_scene(rng, 3))
        for i in range(arguments.answers):
            ids = torch.randint(20, 300, (rng.randint(1, arguments.tokens),), generator=generator)
            question = f"how many red circles are {' '.join(['left of the ring'] * (i % 3))}?"
            reward = rng.random()
            samples.append(TextSample(f"{group}, {i}", image, question, ids, torch.zeros(len(ids)), reward, reward))
    return TextData(samples, grouped(samples, arguments.answers))


def grouped(samples: Sequence[object], size: int) -> list[list[int]]:
    """Positions of groups of neighbours."""
    return [list(range(start, start + size)) for start in range(0, len(samples), size)]


# ---- ours ---------------------------------------------------------------------------------------------------------


def ours(arguments: Namespace, data: IterationData | TextData, vocabulary: int) -> Callable[[], Gradients]:
    """A step of the package, as the train stage makes it on one rank."""
    config, ranks = configuration(arguments), Ranks(0, 0, 1)
    zero3.init_process_group(ranks, arguments.device)
    backbone = policy(arguments, vocabulary)
    texts = isinstance(data, TextData)
    accumulation = micro_batches_per_rank(len(data.samples), 1, arguments.micro_batch)
    name = "zero3_cpu" if arguments.dtype == "float32" else "zero3_bf16"
    ds_config = zero3.load_ds_config(name, arguments.dtype, arguments.micro_batch, accumulation, 1, 1.0)
    backbone.enable_activation_checkpointing(arguments.recompute)
    engine = zero3.Zero3Engine((ReadingPath if texts else DrawingPath)(backbone), ds_config)
    old = [s.old_log_probs for s in data.samples]
    state = RoleState(KlController(coefficient=KL), RunningMean())
    common = (engine, data, config, backbone.device)
    loss = SolverUpdate(*common, state, old) if texts else GrpoUpdate(*common, Sampling(), old)
    updater = Updater(loss, ranks, "solver" if texts else "")
    gradients, step = {}, engine.step

    def watched(rate: float) -> float:
        """The engine's step drops the gradients."""
        trained = [(n, p) for n, p in backbone.model.named_parameters() if p.requires_grad]
        gradients.update({n: safe_get_full_grad(p).float().cpu() for n, p in trained})
        return step(rate)

    engine.step = watched

    def run() -> Gradients:
        loss.state = state
        updater.step(list(range(len(data.groups))), 0, check_ratio=False)
        return gradients

    return run


# ---- theirs -------------------------------------------------------------------------------------------------------


def image_log_probs(backbone: JanusBackbone, prompts: list[str], actions: torch.Tensor) -> torch.Tensor:
    """fp32 [B, S] of image tokens, by the logits of every position."""
    ids, mask = backbone.inputs.drawing(prompts)
    model = backbone.model
    drawn = model.prepare_embeddings_for_image_generation(actions)
    embeddings = torch.cat([model.get_input_embeddings()(ids), drawn], 1)
    mask = torch.cat([mask, mask.new_ones(actions.shape)], 1)
    hidden = model.model.language_model(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=positions_of(mask), use_cache=False
    ).last_hidden_state
    log_probs = model.model.generation_head(hidden).float().log_softmax(-1)
    return log_probs[:, ids.shape[1] - 1 : -1].gather(-1, actions[..., None])[..., 0]


def image_loss(
    model: JanusBackbone, reference: JanusBackbone, data: IterationData, rows: Sequence[int]
) -> torch.Tensor:
    """GRPO's loss of each image."""
    samples = [data.samples[i] for i in rows]
    actions = torch.stack([s.tensors["actions"] for s in samples]).to(model.device)
    log_probs = image_log_probs(model, [s.prompt for s in samples], actions)
    with torch.no_grad():
        base = image_log_probs(reference, [s.prompt for s in samples], actions)
    delta = base - log_probs
    old = torch.stack([s.old_log_probs for s in samples]).to(model.device)
    advantages = torch.tensor([s.advantage for s in samples], device=model.device)
    kl = torch.expm1(delta) - delta
    return grpo_loss(log_probs, old, kl, advantages, torch.ones_like(old), 0.2, 0.2, KL)[0]


def text_log_probs(
    backbone: JanusBackbone, samples: Sequence[TextSample], ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """fp32 [B, T, V] at the answers' tokens, cut out of those of every position."""
    prompts, prompt_mask, pixels = backbone.inputs.reading([s.image for s in samples], [s.question for s in samples])
    whole = torch.cat([prompt_mask, mask.long()], 1)
    logits = backbone.model(
        input_ids=torch.cat([prompts, ids], 1), attention_mask=whole, position_ids=positions_of(whole),
        pixel_values=pixels.to(backbone.model.dtype), use_cache=False,
    ).logits.float()  # fmt: skip
    return (logits / RunConfig().self_consistency.solver_temperature).log_softmax(-1)[:, prompts.shape[1] - 1 : -1]


def text_loss(model: JanusBackbone, reference: JanusBackbone, data: TextData, rows: Sequence[int]) -> torch.Tensor:
    """REINFORCE's loss of each answer."""
    samples = [data.samples[i] for i in rows]
    ids = padded([s.ids for s in samples], model.device)
    mask = padded([torch.ones(len(s.ids)) for s in samples], model.device)
    log_probs = text_log_probs(model, samples, ids, mask)
    with torch.no_grad():
        base = text_log_probs(reference, samples, ids, mask)
    kl = (log_probs.exp() * (log_probs - base)).sum(-1)
    advantages = torch.tensor([s.used_reward for s in samples], device=model.device)
    return reinforce_loss(log_probs.gather(-1, ids[..., None])[..., 0], advantages, mask, kl, KL)[0]


def theirs(arguments: Namespace, data: IterationData | TextData, vocabulary: int) -> Callable[[], Gradients]:
    """A step of the plain loop."""
    model, reference = policy(arguments, vocabulary), policy(arguments, vocabulary, adapted=False)
    trained = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0, weight_decay=0.0)
    loss = text_loss if isinstance(data, TextData) else image_loss
    order = permuted(len(data.samples), 0)

    def run() -> Gradients:
        optimizer.zero_grad()
        for start in range(0, len(order), arguments.micro_batch):
            (loss(model, reference, data, order[start : start + arguments.micro_batch]).sum() / len(order)).backward()
        gradients = {name: p.grad.float().cpu().clone() for name, p in trained.items()}
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        return gradients

    return run


# ---- both ---------------------------------------------------------------------------------------------------------

SIDES = {"ours": ours, "theirs": theirs}


def batch(arguments: Namespace, work: str) -> tuple[IterationData | TextData, int]:
    """Data and text vocabulary of a case."""
    return (image_samples(arguments), 0) if work == "images" else (text_samples(arguments), arguments.vocabulary)


def difference(ours: Gradients, theirs: Gradients) -> float:
    """Norm of the difference of the gradients over that of theirs."""
    gap = math.fsum(float((ours[name] - value).double().square().sum()) for name, value in theirs.items())
    return math.sqrt(gap / math.fsum(float(value.double().square().sum()) for value in theirs.values()))


def held(most: bool) -> int:
    """Bytes that this process holds, or at most held since `peak` was reset."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()
    wanted = "VmHWM:" if most else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(wanted))


def peak(arguments: Namespace) -> None:
    """Print the bytes that one side takes at most."""
    data, vocabulary = batch(arguments, arguments.peak[1])
    zero3.init_process_group(Ranks(0, 0, 1), arguments.device)
    before = held(False)
    run = SIDES[arguments.peak[0]](arguments, data, vocabulary)
    run()
    run()
    print(json.dumps(held(True) - before))


def measured_peak(side: str, work: str, argv: Sequence[str]) -> int:
    """`peak` of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training_step", *argv, "--peak", side, work]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, **RETURNED})
    return json.loads(done.stdout.splitlines()[-1])


def rows(arguments: Namespace, argv: Sequence[str], work: str, limits: Limits) -> list[Row]:
    """Time and memory of a case."""
    data, vocabulary = batch(arguments, work)
    if work == "images":
        add_reference(arguments, data)
    sides = [side(arguments, data, vocabulary) for side in SIDES.values()]
    fast, slow, found, expected = measuring.compare(*sides, arguments.repeats, arguments.clock)
    worst = difference(found, expected)
    print(f"{work}: {len(data.samples) / fast:.3g} samples/s, relative difference of gradients {worst:.1e}")
    if not worst <= TOLERANCE[getattr(torch, arguments.dtype)]:
        raise SystemExit("the sides compute different gradients")
    part = limits.seconds(measuring.operations(sides[0])) / fast
    least, most = (measured_peak(side, work, argv) for side in SIDES)
    case = f"{work}, {len(data.samples)}"
    return [
        Row("training step", case, slow / fast, 1.3, fast, slow, part),
        Row("training step", f"{case}, peak GiB, at most", least / most, 0.6, least / 2**30, most / 2**30),
    ]


def main(argv: list[str] | None = None) -> None:
    """Images, then texts."""
    argv = sys.argv[1:] if argv is None else argv
    parser = measuring.parser(__doc__)
    parser.add_argument("--width", type=int, default=512, help="of the language model, a multiple of 256")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--head", type=int, default=64, help="width of an attention head; 128 for Janus-Pro")
    parser.add_argument("--side", type=int, default=12, help="rows and columns of image tokens; Janus-Pro: 24")
    parser.add_argument("--vocabulary", type=int, default=102400, help="of texts; with images there is a small one")
    parser.add_argument("--groups", type=int, default=2, help="prompts, or images that are asked about")
    parser.add_argument("--group", type=int, default=8, help="images of a prompt")
    parser.add_argument("--answers", type=int, default=7, help="texts about an image")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer at most")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--recompute", type=float, default=0.0, help="our train.activation_checkpointing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--work", choices=("images", "texts"), nargs="+", default=["images", "texts"])
    parser.add_argument("--peak", nargs=2, metavar=("SIDE", "WORK"), help="print the peak memory of one side alone")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        peak(arguments)
        return
    limits = Limits.measured(arguments.device, getattr(torch, arguments.dtype), arguments.clock)
    print(limits)
    for work in arguments.work:
        measuring.report(rows(arguments, argv, work, limits), arguments.out)


if __name__ == "__main__":
    main()
