"""The train stage: rollouts and rewards in; checkpoint, metrics and policy weights out.

    1. start from the base weights, or from the checkpoint of the iteration before
    2. optimiser steps; their metrics stay in memory
    3. train/metrics.jsonl, then the checkpoint with its marker, then policy/, then train/manifest.json

A process killed before the marker repeats the iteration from 1, one killed after it goes on with the policy.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from unified_rl.backbones.load import Backbone, load_backbone
from unified_rl.config import RunConfig
from unified_rl.files import atomic_write_bytes
from unified_rl.ledger import Run
from unified_rl.manifests import Manifest
from unified_rl.report.tensorboard import write_tensorboard
from unified_rl.report.timing import append_timing
from unified_rl.report.truth import read_truth
from unified_rl.runtime import (
    EXIT_OK,
    EXIT_STOPPED,
    Ranks,
    StopRequest,
    enable_determinism,
    log,
    progress,
    sample_seed,
    set_cpu_threads,
)
from unified_rl.train import checkpoints, zero3
from unified_rl.train.batching import global_batches, micro_batches_per_rank
from unified_rl.train.checkpoints import Checkpoint
from unified_rl.train.drawing import DrawingPath, frozen_sha256, select_trainable
from unified_rl.train.export import export_policy
from unified_rl.train.losses import GrpoUpdate, RewardWeightedUpdate
from unified_rl.train.samples import IterationData, load_iteration
from unified_rl.train.update import Updater, recomputed_log_probs
from unified_rl.train.zero3 import TrainError, Zero3Engine

STAGE = "train"
METRICS = "metrics.jsonl"


def train(run: Run, iteration: int, ranks: Ranks) -> int:
    """Train one iteration; called by every rank.

    Raises:
        TrainError, LedgerError, ShardError, RecordError, ConfigError: see their messages.
    """
    if run.manifest(iteration, STAGE) is not None:
        if ranks.rank == 0:
            log(f"iteration {iteration} is already committed")
        return EXIT_OK
    with run.lock(STAGE) if ranks.rank == 0 else nullcontext():
        started = time.monotonic()
        code = train_iteration(run, iteration, ranks)
        if code == EXIT_OK and ranks.rank == 0:
            append_timing(run.path, STAGE, iteration, time.monotonic() - started)
        return code


@dataclass
class Trainer:
    """What the steps of an iteration work with; `state` describes the weights that the engine holds."""

    backbone: Backbone
    engine: Zero3Engine
    names: list[str]
    device: torch.device
    frozen_sha256: str
    state: Checkpoint | None


def train_iteration(run: Run, iteration: int, ranks: Ranks) -> int:
    """Everything between taking and releasing the lock."""
    config = run.config
    set_cpu_threads(config.backbone.threads)
    enable_determinism()
    # Before the weights are loaded: a missing stage should not cost minutes.
    finished = checkpoints.read_checkpoint(run, iteration, ranks.world_size)
    if finished is None and iteration > 0:
        checkpoints.require_checkpoint(run, iteration - 1, ranks.world_size)
    data = load_iteration(run, iteration) if finished is None else None
    trainer = start(run, iteration if finished else iteration - 1, ranks)
    with StopRequest() as stop:
        if data is not None:
            finished = optimise(run, iteration, ranks, trainer, data, stop)
        if finished is None:
            zero3.leave_process_group()
            return EXIT_STOPPED
        commit(run, finished, ranks, trainer)
    zero3.leave_process_group()
    return EXIT_OK


def start(run: Run, iteration: int, ranks: Ranks) -> Trainer:
    """Base weights under ZeRO-3, then the checkpoint after `iteration` (-1: none)."""
    config = run.config
    dtype = getattr(torch, config.backbone.dtype)
    on_gpu = config.backbone.device == "cuda" or (config.backbone.device == "auto" and torch.cuda.is_available())
    ds_config = engine_config(config, ranks.world_size)
    zero3.init_process_group(ranks, "cuda" if on_gpu else "cpu")
    backbone = load_backbone(config.backbone, ranks.local_rank, ds_config=ds_config)
    if config.train.scope == "lora":
        backbone.add_lora(config.train.lora.rank, config.train.lora.alpha)
    if config.train.activation_checkpointing:
        backbone.enable_activation_checkpointing()
    names = select_trainable(backbone, config.train.scope, dtype)
    frozen = zero3.from_rank_zero(frozen_sha256(backbone.model, names))
    betas = (config.train.beta1, config.train.beta2)
    engine = Zero3Engine(DrawingPath(backbone), ds_config, betas, config.train.weight_decay)
    trainer = Trainer(backbone, engine, names, backbone.device, frozen, None)
    if iteration >= 0:
        trainer.state = checkpoints.require_checkpoint(run, iteration, ranks.world_size)
        restore(run, trainer)
    return trainer


def engine_config(config: RunConfig, world_size: int) -> dict:
    """The DeepSpeed configuration of the run."""
    images = config.train.groups_per_step * config.rollout.group_size
    accumulation = micro_batches_per_rank(images, world_size, config.train.micro_batch)
    return zero3.load_ds_config(
        config.train.ds_config, config.backbone.dtype, config.train.micro_batch, accumulation, world_size,
        config.train.max_grad_norm,
    )  # fmt: skip


def restore(run: Run, trainer: Trainer) -> None:
    """Load the checkpoint `trainer.state`.

    Raises:
        TrainError: the frozen weights are not those that it was trained with.
    """
    state = trainer.state
    folder = checkpoints.folder_of(run, state.iteration)
    if state.frozen_sha256 != trainer.frozen_sha256:
        raise TrainError(
            f"the frozen weights changed since {folder} was written (sha256 {state.frozen_sha256[:12]}, now "
            f"{trainer.frozen_sha256[:12]}): restore the base checkpoint {trainer.backbone.path}"
        )
    stored = trainer.engine.load(folder)
    if (stored["iteration"], stored["step"]) != (state.iteration, state.step):
        raise TrainError(f"{folder} holds another state than its marker says; delete {folder.name} and train it again")
    torch.set_rng_state(stored["rng"])
    if trainer.device.type == "cuda":
        torch.cuda.set_rng_state(stored["cuda_rng"], trainer.device)


def optimise(
    run: Run, iteration: int, ranks: Ranks, trainer: Trainer, data: IterationData, stop: StopRequest
) -> Checkpoint | None:
    """All optimiser steps of the iteration, metrics and checkpoint; None when stopped on request."""
    config = run.config
    seeds = [sample_seed(config.seed, iteration, "order", epoch) for epoch in range(config.train.epochs)]
    steps = global_batches(range(len(data.groups)), config.train.groups_per_step, seeds)
    if not steps and ranks.rank == 0:
        log(f"iteration {iteration}: no group of {data.zero_std_groups} has a spread of rewards, nothing to learn")
    first = trainer.state.step if trainer.state else 0
    updater = make_updater(run, ranks, trainer, data)
    lines = []
    with progress(len(steps), "optimiser steps") if ranks.rank == 0 else nullcontext() as bar:
        for number, groups in enumerate(steps, first):
            if stop_wanted(stop, trainer.device):
                return None
            metrics = updater.step(groups, number, check_ratio=number == first)
            lines.append({"iteration": iteration, "step": number + 1, **metrics})
            if bar is not None:
                bar.update(1, **{name: metrics[name] for name in ("reward", "kl") if name in metrics})
                run.write_status(
                    stage=STAGE, iteration=iteration, done=bar.done, total=len(steps), eta_s=bar.eta_s,
                    reward=metrics["reward"],
                )  # fmt: skip
    counts = {
        "groups_used": len(data.groups),
        "groups_zero_std": data.zero_std_groups,
        "groups_failed": data.failed_groups,
        "steps": len(steps),
        "images": sum(len(group) for group in data.groups),
    }
    state = Checkpoint(
        iteration, first + len(steps), ranks.world_size, run.config_hash, trainer.frozen_sha256, counts,
        data.reward_mean,
    )  # fmt: skip
    if ranks.rank == 0:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        atomic_write_bytes(run.stage_folder(iteration, STAGE) / METRICS, text.encode())
    save(run, state, ranks, trainer)
    return state


def make_updater(run: Run, ranks: Ranks, trainer: Trainer, data: IterationData) -> Updater:
    """The updater of the configured kind, for GRPO with the old log-probs that the configuration asks for."""
    config, engine, device = run.config, trainer.engine, trainer.device
    if config.policy.objective == "reward_weighted":
        return Updater(RewardWeightedUpdate(engine, data, config, device), ranks)
    sampling = trainer.backbone.sampling_type.from_dict(data.sampling)
    old = [sample.tensors["log_probs"] for sample in data.samples]
    if config.train.old_log_probs == "recomputed":
        old = recomputed_log_probs(engine, data, sampling, config.train.micro_batch, ranks, device)
    return Updater(GrpoUpdate(engine, data, config, device, sampling, old), ranks)


def stop_wanted(stop: StopRequest, device: torch.device) -> bool:
    """Whether any rank was asked to stop; the same answer on all ranks."""
    return bool(zero3.reduced_sum(torch.tensor(float(stop.requested), device=device)))


def save(run: Run, state: Checkpoint, ranks: Ranks, trainer: Trainer) -> None:
    """Check that nothing frozen moved, then write the checkpoint and its marker, then drop old ones."""
    frozen = zero3.from_rank_zero(frozen_sha256(trainer.backbone.model, trainer.names))
    if frozen != trainer.frozen_sha256:
        raise TrainError("training changed weights that must stay frozen; nothing of this iteration was stored")
    if ranks.rank == 0:
        checkpoints.clear_unfinished(run, state.iteration)
    zero3.barrier()
    on_gpu = trainer.device.type == "cuda"
    rng = {
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(trainer.device) if on_gpu else None,
    }
    folder = checkpoints.folder_of(run, state.iteration)
    trainer.engine.save(folder, {"iteration": state.iteration, "step": state.step, **rng})
    zero3.barrier()
    if ranks.rank == 0:
        checkpoints.complete(run, state)
        checkpoints.delete_old(run, run.config.train.keep_checkpoints)


def commit(run: Run, state: Checkpoint, ranks: Ranks, trainer: Trainer) -> None:
    """Write the policy and the manifest."""
    digest = export_policy(
        trainer.backbone, run.policy_folder(state.iteration), run.config.train.scope, trainer.names, ranks.rank == 0
    )
    if ranks.rank != 0:
        return
    folder: Path = checkpoints.folder_of(run, state.iteration)
    extra = {
        "policy_sha256": digest,
        "checkpoint": str(folder.relative_to(run.path)),
        "reward_mean": state.reward_mean,
    }
    version = run.current_policy(state.iteration)[1]
    run.commit(Manifest(STAGE, state.iteration, [], version, run.config_hash, state.counts, [], extra))
    # Here and not in a process of its own: torch is loaded already, and a watcher sees every iteration.
    write_tensorboard(read_truth(run.path))
    log(f"iteration {state.iteration}: {state.counts['steps']} steps, mean reward {state.reward_mean:.4f}")
