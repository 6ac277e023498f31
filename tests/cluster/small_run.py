"""The real loop, small: eight prompts, eight shards, eight optimiser steps; and its processes, caught in mid-stage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.cluster.waiting import wait_for

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
OVERRIDES = (
    "iterations=1", "data.prompts_per_iteration=8", "rollout.group_size=8", "rollout.groups_per_shard=1",
    "rollout.groups_per_batch=1", "reward.batch_size=8", "train.groups_per_step=1", "train.micro_batch=4",
    "rollout.workers=2", "reward.workers=2", "train.ranks=1", "evaluate.prompts=''",
)  # fmt: skip


def arguments(run: Path, prompts: Path, *overrides: str) -> list[str]:
    """Of a launcher."""
    return ["--run", str(run), "--recipe", "gvu_janus_shapes", f"data.prompts={prompts}", *OVERRIDES, *overrides]


def pack_prompts(folder: Path) -> Path:
    """Prompt shards of the world of shapes."""
    pack = [sys.executable, str(ROOT / "data_tools/pack_prompts.py"), "--shapes", "train", "--out", str(folder)]
    subprocess.run(pack, check=True, env=ENVIRONMENT, capture_output=True)
    return folder


def copy_stages(run: Path, to: Path, *stages: str) -> Path:
    """A run folder with the configuration of `run` and only these stages of its iteration 0."""
    to.mkdir()
    shutil.copy(run / "config.yaml", to)
    for stage in stages:
        shutil.copytree(run / "iter_0000" / stage, to / "iter_0000" / stage)
    return to


def status_of(run: Path) -> str:
    """What `make status` prints."""
    command = [sys.executable, "-m", "unified_rl.ledger", "status", str(run)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=120).stdout


def processes_of(run: Path, stage: str) -> list[int]:
    """The processes at work on a stage, in whatever namespace; launchers are none of them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # ended in between
            continue
        if f"unified_rl.{stage}".encode() in words and str(run).encode() in words and b"-m" in words[:4]:
            found.append(int(folder.name))
    return [pid for pid in found if b"launcher" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def begun(run: Path, stage: str) -> bool:
    """Whether a part of the stage is done: a shard, an optimiser step."""
    if stage != "train":
        return any((run / "iter_0000" / stage).glob("shard-*.done.json"))
    try:
        status = json.loads((run / "status.json").read_bytes())
    except OSError:
        return False
    return status["stage"] == "train" and status["done"] >= 1


@contextmanager
def held_in_the_middle(run: Path, stage: str, story: Callable[[], str]) -> Iterator[list[int]]:
    """All processes of a stage stand still while it has begun and is not finished."""
    wait_for(lambda: begun(run, stage), 300, lambda: f"{stage} does not begin\n{story()}")
    held = processes_of(run, stage)
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    try:
        assert held, f"{stage} ended before it could be held"
        assert not (run / "iter_0000" / stage / "manifest.json").exists()
        yield held
    finally:
        for pid in held:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def was_sent(pid: int, number: signal.Signals) -> bool:
    """Whether a signal waits for a process that stands still."""
    status = Path(f"/proc/{pid}/status").read_text()
    pending = next(line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd"))
    return bool(int(pending, 16) >> (number - 1) & 1)
