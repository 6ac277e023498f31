"""The train stage: rollouts and rewards in; checkpoint, metrics and policy weights out.

    1. start from the base weights, or from the checkpoint of the last iteration that trained them
    2. optimiser steps; their metrics stay in memory
    3. train/metrics.jsonl, then the checkpoint with its marker, then policy/
    4. train/manifest.json

An iteration of Ask-Solve-Generate trains its roles one after the other: 1 to 3 for each, each with an engine of its
own. A process killed before a marker repeats that role from 1, one killed after it goes on with the policy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from unified_rl.backbones.load import Backbone, load_backbone
from unified_rl.config import RunConfig
from unified_rl.disk import drop_old_shards
from unified_rl.files import atomic_write_bytes
from unified_rl.ledger import Run
from unified_rl.manifests import Manifest
from unified_rl.report.tensorboard import write_tensorboard
from unified_rl.report.timing import append_timing
from unified_rl.report.truth import read_truth
from unified_rl.runtime import (
    EXIT_OK,
    EXIT_STOPPED,
    Progress,
    Ranks,
    StopRequest,
    enable_determinism,
    log,
    sample_seed,
    set_cpu_threads,
)
from unified_rl.train import checkpoints, roles, zero3
from unified_rl.train.batching import global_batches, micro_batches_per_rank
from unified_rl.train.checkpoints import Checkpoint
from unified_rl.train.drawing import DrawingPath, different, frozen_sha256, select_trainable, tensor_sha256
from unified_rl.train.export import export_policy
from unified_rl.train.losses import GrpoUpdate, RewardWeightedUpdate, inputs_of, plans_of
from unified_rl.train.reading import ReadingPath
from unified_rl.train.samples import IterationData
from unified_rl.train.text_losses import ProposerUpdate, RoleState, SolverUpdate, TextUpdate
from unified_rl.train.texts import TEXT_ROLES, TextData
from unified_rl.train.update import Updater, old_log_probs
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
    with run.lock(STAGE) if ranks.rank == 0 else nullcontext(), zero3.lost_ranks_named():
        started = time.monotonic()
        code = train_iteration(run, iteration, ranks)
        if code == EXIT_OK and ranks.rank == 0:
            append_timing(run.path, STAGE, iteration, time.monotonic() - started)
        return code


@dataclass
class Trainer:
    """What the steps of a role work with; `state` describes the weights that the engine holds."""

    role: str
    backbone: Backbone
    engine: Zero3Engine
    names: list[str]
    device: torch.device
    frozen_sha256: dict[str, str]
    state: Checkpoint | None


@dataclass
class Job:
    """A role that an iteration trains: on what, and which iteration's checkpoint it starts from (-1: the base weights).

    `finished` is its checkpoint once it is trained, `digest` the SHA-256 of its policy once that is written.
    """

    role: str
    data: IterationData | TextData | None
    after: int
    finished: Checkpoint | None
    digest: str = ""


def train_iteration(run: Run, iteration: int, ranks: Ranks) -> int:
    """Everything between taking and releasing the lock."""
    config = run.config
    set_cpu_threads(config.backbone.threads)
    enable_determinism()
    # Before any weights are loaded: a missing stage should not cost minutes.
    jobs = [plan(run, iteration, role) for role in roles.roles_of(config, iteration)]
    run.stage_folder(iteration, STAGE)  # tells that training has begun
    stop = StopRequest()
    for job in jobs:
        stopped = train_role(run, iteration, ranks, job, stop)
        if stopped and any(job.finished is None for job in jobs):
            zero3.leave_process_group()
            return EXIT_STOPPED
        zero3.free_memory()  # of this role's model, before the next one is loaded
    with stop:
        if ranks.rank == 0:
            commit(run, jobs)
    zero3.leave_process_group()
    return EXIT_OK


def train_role(run: Run, iteration: int, ranks: Ranks, job: Job, stop: StopRequest) -> bool:
    """Train a role and write its policy; returns whether a stop was asked for, at once before the role is finished."""
    trainer = start(run, job.role, iteration if job.finished else job.after, ranks)
    with stop:
        job.finished = job.finished or optimise(run, iteration, ranks, trainer, job.data, stop)
        if job.finished is None:
            return True
        folder = run.policy_folder(iteration) / job.role
        job.digest = export_policy(trainer.backbone, folder, run.config.train.scope, trainer.names, ranks.rank == 0)
        stopped = stop_wanted(stop, trainer.device)
    trainer.engine.close()
    return stopped


def plan(run: Run, iteration: int, role: str) -> Job:
    """What is to be done for a role."""
    finished = checkpoints.read_checkpoint(run, iteration, role)
    after = roles.last_trained(run.config, iteration, role)
    if finished is not None:
        return Job(role, None, after, finished)
    if after >= 0:
        checkpoints.require_checkpoint(run, after, role)
    return Job(role, roles.load_data(run, iteration, role), after, None)


def start(run: Run, role: str, iteration: int, ranks: Ranks) -> Trainer:
    """Base weights under ZeRO-3 with the role's adapter, then its checkpoint after `iteration` (-1: none)."""
    config = run.config
    dtype = getattr(torch, config.backbone.dtype)
    on_gpu = config.backbone.device == "cuda" or (config.backbone.device == "auto" and torch.cuda.is_available())
    ds_config = engine_config(config, ranks.world_size, role)
    zero3.init_process_group(ranks, "cuda" if on_gpu else "cpu", config.train.timeout_s)
    backbone = load_backbone(config.backbone, ranks.local_rank, ds_config=ds_config)
    if config.train.scope == "lora":
        backbone.add_lora(config.train.lora.rank, config.train.lora.alpha, role)
    backbone.enable_activation_checkpointing(config.train.activation_checkpointing)
    names = select_trainable(backbone, config.train.scope, dtype)
    frozen = zero3.from_rank_zero(frozen_sha256(backbone.model, names))
    betas = (config.train.beta1, config.train.beta2)
    path = (ReadingPath if role in TEXT_ROLES else DrawingPath)(backbone)
    engine = Zero3Engine(path, ds_config, betas, config.train.weight_decay)
    trainer = Trainer(role, backbone, engine, names, backbone.device, frozen, None)
    if iteration >= 0:
        trainer.state = checkpoints.require_checkpoint(run, iteration, role)
        restore(run, trainer)
    return trainer


def engine_config(config: RunConfig, world_size: int, role: str = "") -> dict:
    """The DeepSpeed configuration of the run for one role."""
    groups, size = roles.samples_per_step(config, role)
    accumulation = micro_batches_per_rank(groups * size, world_size, config.train.micro_batch)
    return zero3.load_ds_config(
        config.train.ds_config, config.backbone.dtype, config.train.micro_batch, accumulation, world_size,
        config.train.max_grad_norm,
    )  # fmt: skip


def restore(run: Run, trainer: Trainer) -> None:
    """Load the checkpoint `trainer.state`, whatever number of ranks wrote it.

    Raises:
        TrainError: a frozen weight is not the one that it was trained with, or a trained one not the one that was
            stored; the message names them.
    """
    state = trainer.state
    folder = checkpoints.folder_of(run, state.iteration, state.role)
    changed = different(state.frozen_sha256, trainer.frozen_sha256)
    if changed:
        raise TrainError(
            f"frozen weights changed since {folder} was written: {changed}; restore the base checkpoint "
            f"{trainer.backbone.path}"
        )
    stored = trainer.engine.load(folder, state.world_size)
    changed = different(state.trained_sha256, tensor_sha256(trainer.backbone.model, trainer.names))
    if changed or (stored["iteration"], stored["step"]) != (state.iteration, state.step):
        raise TrainError(
            f"{folder} holds another state than its marker says ({changed or 'its step'}); delete it and its "
            "iteration's train stage, and train again"
        )
    torch.set_rng_state(stored["rng"])
    if trainer.device.type == "cuda":
        torch.cuda.set_rng_state(stored["cuda_rng"], trainer.device)


def optimise(
    run: Run, iteration: int, ranks: Ranks, trainer: Trainer, data: IterationData | TextData, stop: StopRequest
) -> Checkpoint | None:
    """All optimiser steps of a role in the iteration, metrics and checkpoint; None when stopped on request."""
    config, role = run.config, trainer.role
    steps = batches_of(config, iteration, role, len(data.groups))
    if not steps and ranks.rank == 0:
        log(f"iteration {iteration}{role and ', '}{role}: nothing to learn from groups of {data.counts}")
    first = trainer.state.step if trainer.state else 0
    updater = make_updater(run, ranks, trainer, data, steps) if steps else None
    lines = []
    with Progress(len(steps), "optimiser steps") if ranks.rank == 0 else nullcontext() as bar:
        for number, groups in enumerate(steps, first):
            if stop_wanted(stop, trainer.device):
                return None
            metrics = updater.step(groups, number, check_ratio=number == first)
            named = roles.named(role, metrics, "/")
            lines.append({"iteration": iteration, "step": number + 1, **({"role": role} if role else {}), **named})
            if bar is not None:
                bar.update(1, **{name: metrics[name] for name in ("reward", "kl") if name in metrics})
                run.write_status(
                    stage=STAGE, iteration=iteration, done=bar.done, total=len(steps), eta_s=bar.eta_s,
                    reward=metrics["reward"],
                )  # fmt: skip
    adapted = trainer.state.state if trainer.state else {}
    if updater is not None and isinstance(updater.loss, TextUpdate):
        adapted = updater.loss.state.to_dict()
    state = Checkpoint(
        iteration, first + len(steps), ranks.world_size, run.config_hash, trainer.frozen_sha256,
        tensor_sha256(trainer.backbone.model, trainer.names), {**data.counts, "steps": len(steps)}, data.reward_mean,
        role, adapted,
    )  # fmt: skip
    if ranks.rank == 0:
        store_metrics(run, iteration, role, lines)
    save(run, state, ranks, trainer)
    return state


def batches_of(config: RunConfig, iteration: int, role: str, groups: int) -> list[list[int]]:
    """Groups of each optimiser step; the Solver's answers are used once, as they have no ratio."""
    epochs = 1 if role == "solver" else config.train.epochs
    name = f"order-{role}" if role in TEXT_ROLES else "order"
    seeds = [sample_seed(config.seed, iteration, name, epoch) for epoch in range(epochs)]
    return global_batches(range(groups), roles.samples_per_step(config, role)[0], seeds)


def store_metrics(run: Run, iteration: int, role: str, lines: list[dict]) -> None:
    """Write metrics.jsonl: the lines of the roles that were trained before this one in the iteration, and `lines`."""
    path = run.stage_folder(iteration, STAGE) / METRICS
    names = roles.roles_of(run.config, iteration)
    earlier = names[: names.index(role)]
    if earlier and path.exists():  # not after a role's checkpoint was lost, and the folder deleted as its error says
        stored = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [line for line in stored if line["role"] in earlier] + lines
    atomic_write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def make_updater(
    run: Run, ranks: Ranks, trainer: Trainer, data: IterationData | TextData, steps: Sequence[Sequence[int]]
) -> Updater:
    """The updater of the role for `steps`, the groups of each, for images of the configured kind."""
    config, engine, device, role = run.config, trainer.engine, trainer.device, trainer.role
    if role in TEXT_ROLES:
        state = RoleState.of(config, trainer.state.state if trainer.state else None, data.reward_mean or 0.0)
        texts = (ProposerUpdate if role == "proposer" else SolverUpdate)(engine, data, config, device, state)
        texts.old_log_probs = old_log_probs(config, data, steps, lambda rows: texts.replay(rows)[1], ranks, device)
        return Updater(texts, ranks, role)
    if config.policy.objective == "reward_weighted":
        return Updater(RewardWeightedUpdate(engine, data, config, device), ranks, role)
    sampling = trainer.backbone.sampling_type.from_dict(data.sampling)

    def replay(rows: list[int]) -> torch.Tensor:
        samples = [data.samples[i] for i in rows]
        return engine("decisions", *inputs_of(samples, device), sampling, None, plans_of(samples), None)[0]

    old = old_log_probs(config, data, steps, replay, ranks, device)
    return Updater(GrpoUpdate(engine, data, config, device, sampling, old), ranks, role)


def stop_wanted(stop: StopRequest, device: torch.device) -> bool:
    """Whether any rank was asked to stop; the same answer on all ranks."""
    return bool(zero3.reduced_sum(torch.tensor(float(stop.requested), device=device)))


def save(run: Run, state: Checkpoint, ranks: Ranks, trainer: Trainer) -> None:
    """Check that nothing frozen moved, then write the checkpoint and its marker, then drop old ones."""
    frozen = zero3.from_rank_zero(frozen_sha256(trainer.backbone.model, trainer.names))
    changed = different(trainer.frozen_sha256, frozen)
    if changed:
        raise TrainError(f"training changed {changed}, which must stay frozen; nothing of this iteration was stored")
    if ranks.rank == 0:
        checkpoints.clear_unfinished(run, state.iteration, state.role)
    zero3.barrier()
    on_gpu = trainer.device.type == "cuda"
    rng = {
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(trainer.device) if on_gpu else None,
    }
    folder = checkpoints.folder_of(run, state.iteration, state.role)
    try:
        with zero3.lost_ranks_named():
            trainer.engine.save(folder, {"iteration": state.iteration, "step": state.step, **rng})
    except (OSError, RuntimeError) as error:  # torch's own writer raises RuntimeError when the disk is full
        raise TrainError(
            f"{folder} could not be written: {str(error).splitlines()[0]}. Make room or correct the permissions, then "
            "run the same command again: it repeats this training"
        ) from error
    zero3.barrier()
    if ranks.rank == 0:
        checkpoints.complete(run, state)
        checkpoints.delete_old(run, run.config.train.keep_checkpoints, state.role)


def commit(run: Run, jobs: list[Job]) -> None:
    """Make the policy whole, then write the manifest."""
    states = [job.finished for job in jobs]
    iteration, digest = states[0].iteration, jobs[0].digest
    if states[0].role:
        roles.carry_over(run, iteration)
        digest = roles.policy_digest(run.policy_folder(iteration))
    counts, extra = {}, {"policy_sha256": digest}
    for state in states:
        folder: Path = checkpoints.folder_of(run, iteration, state.role)
        about = {"checkpoint": str(folder.relative_to(run.path))}
        if state.reward_mean is not None:
            about["reward_mean"] = state.reward_mean
        counts |= roles.named(state.role, state.counts, "_")
        extra |= roles.named(state.role, about, "_")
    counts["steps"] = sum(state.counts["steps"] for state in states)
    version = run.current_policy(iteration)[1]
    run.commit(Manifest(STAGE, iteration, [], version, run.config_hash, counts, [], extra))
    drop_old_shards(run, iteration)
    # Here and not in a process of its own: torch is loaded already, and a watcher sees every iteration.
    write_tensorboard(read_truth(run.path))
    for state in states:
        mean = "no reward" if state.reward_mean is None else f"mean reward {state.reward_mean:.4f}"
        log(f"iteration {iteration}{state.role and ', '}{state.role}: {state.counts['steps']} steps, {mean}")
