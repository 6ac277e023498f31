"""ZeRO-3 checkpoints of a run: which ones are whole, which one an iteration starts from, which ones go.

RUN/checkpoints/iter_0003/          files of DeepSpeed, one set per rank
                          COMPLETE   JSON, written last: what the checkpoint is
RUN/checkpoints/solver/iter_0003/   the same of one role, where an iteration trains several
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unified_rl.files import fsync
from unified_rl.ledger import Run, iteration_name
from unified_rl.manifests import encode_json, read_json, store
from unified_rl.train.zero3 import TrainError

MARKER = "COMPLETE"


@dataclass(frozen=True)
class Checkpoint:
    """Content of the marker: the state after an iteration's training.

    `step` counts optimiser steps of the role over all iterations; `world_size` ranks wrote the files. The digests of
    every tensor, trained or not, are compared after each resume. `counts` and `reward_mean` (None without a sample)
    are for the train manifest, should the process die before that is written. `state` is what the loss adapts.
    """

    iteration: int
    step: int
    world_size: int
    config_hash: str
    frozen_sha256: dict[str, str]
    trained_sha256: dict[str, str]
    counts: dict[str, int]
    reward_mean: float | None
    role: str = ""
    state: dict[str, Any] = field(default_factory=dict)


def folder_of(run: Run, iteration: int, role: str = "") -> Path:
    """RUN/checkpoints/[ROLE/]iter_0003, whether it exists or not."""
    return run.path / "checkpoints" / role / iteration_name(iteration)


def read_checkpoint(run: Run, iteration: int, role: str = "") -> Checkpoint | None:
    """The marker of a whole checkpoint; None when there is none.

    Raises:
        TrainError: written with another configuration or by another version.
    """
    path = folder_of(run, iteration, role) / MARKER
    content = read_json(path)
    if content is None:
        return None
    if set(content) != set(Checkpoint.__dataclass_fields__):
        raise TrainError(f"{path} is not the marker of a checkpoint of this version")
    checkpoint = Checkpoint(**content)
    if checkpoint.config_hash != run.config_hash:
        raise TrainError(f"{path} belongs to configuration {checkpoint.config_hash}, this run has {run.config_hash}")
    return checkpoint


def require_checkpoint(run: Run, iteration: int, role: str = "") -> Checkpoint:
    """The checkpoint that the next iteration that trains the role starts from.

    Raises:
        TrainError: it is missing.
    """
    checkpoint = read_checkpoint(run, iteration, role)
    if checkpoint is None:
        later = f"the next training of the {role}" if role else f"iteration {iteration + 1}"
        raise TrainError(
            f"{folder_of(run, iteration, role)} is missing or unfinished, and {later} continues from it; "
            f"if it is lost, delete {iteration_name(iteration)}/train and train that iteration again"
        )
    return checkpoint


def clear_unfinished(run: Run, iteration: int, role: str = "") -> None:
    """Remove what a killed process left of this iteration's checkpoint."""
    shutil.rmtree(folder_of(run, iteration, role), ignore_errors=True)


def complete(run: Run, checkpoint: Checkpoint) -> None:
    """Make the files durable, then write the marker."""
    folder = folder_of(run, checkpoint.iteration, checkpoint.role)
    for path in [*sorted(p for p in folder.rglob("*") if p.is_file()), folder]:
        fsync(path)
    store(folder / MARKER, encode_json(asdict(checkpoint)))


def delete_old(run: Run, keep: int, role: str = "") -> None:
    """Delete all but the newest `keep` whole checkpoints of the role; unfinished ones are left alone."""
    markers = sorted((run.path / "checkpoints" / role).glob(f"iter_*/{MARKER}"))
    for marker in markers[:-keep]:
        marker.unlink()  # first: a half-deleted checkpoint must not look whole
        shutil.rmtree(marker.parent)
