"""The state of a run as text: what is done in every iteration, what is being done, how long it will take."""

from __future__ import annotations

import argparse
import datetime
import os
import socket
import sys
import time
from pathlib import Path

from unified_rl.config import load_run_config
from unified_rl.ledger import Run, read_status
from unified_rl.manifests import Manifest
from unified_rl.runtime import EXIT_OK, format_seconds, set_stage

STAGES = ("rollout", "reward", "train")
HEADER = ("iteration", *STAGES, "images", "failed", "reward", "policy")
WATCH_SECONDS = 2.0


def rollout_shards(run: Run) -> int:
    """Number of rollout shards of an iteration, from the configuration."""
    return -(-run.config.data.prompts_per_iteration // run.config.rollout.groups_per_shard)


def _stage_cell(run: Run, iteration: int, stage: str, manifest: Manifest | None, total: int) -> str:
    if manifest is not None:
        return "done" if stage == "train" else f"{len(manifest.shards)}/{len(manifest.shards)}"
    folder = run.iteration_folder(iteration) / stage
    if not folder.is_dir():
        return "-"
    return "started" if stage == "train" else f"{len(list(folder.glob('shard-*.done.json')))}/{total}"


def iteration_row(run: Run, iteration: int) -> tuple[str, ...]:
    """One line of the table: finished/all shards of each stage, and what the manifests say."""
    manifests = {stage: run.manifest(iteration, stage) for stage in STAGES}
    rollout, reward = manifests["rollout"], manifests["reward"]
    total = len(rollout.shards) if rollout else rollout_shards(run)
    mean = reward.extra.get("reward_mean") if reward else None
    return (
        str(iteration),
        *(_stage_cell(run, iteration, stage, manifests[stage], total) for stage in STAGES),
        str(rollout.counts.get("images", "")) if rollout else "",
        str(reward.counts.get("failed", 0)) if reward else "",
        f"{mean:.4f}" if isinstance(mean, float) else "",
        rollout.policy_version if rollout else "",
    )


def _alive(status: dict) -> bool:
    """False only where it is certain that the process that wrote the status is gone."""
    if status.get("host") != socket.gethostname() or not isinstance(status.get("pid"), int):
        return True
    try:
        os.kill(status["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _age(status: dict) -> str:
    try:
        then = datetime.datetime.fromisoformat(status["updated"])
        return format_seconds((datetime.datetime.now(datetime.timezone.utc) - then).total_seconds())
    except (KeyError, TypeError, ValueError):
        return "?"


def activity_line(status: dict | None) -> str:
    """What the run said last about itself."""
    if status is None:
        return "not started, or no status yet"
    state = str(status.get("state", "?"))
    if state == "running" and not _alive(status):
        state = "interrupted (its process is gone; the same command continues)"
    parts = [state]
    if status.get("stage"):
        parts.append(f"{status['stage']} of iteration {status.get('iteration')} (of {status.get('iterations')})")
    if status.get("total"):
        parts.append(f"{status.get('done')}/{status['total']}")
    if isinstance(status.get("eta_s"), (int, float)) and state == "running":
        parts.append(f"eta {format_seconds(status['eta_s'])}")
    if isinstance(status.get("reward"), float):
        parts.append(f"reward {status['reward']:.4f}")
    parts.append(f"{_age(status)} ago by process {status.get('pid')} on {status.get('host')}")
    return ", ".join(parts)


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _last_checkpoint(run: Run, iterations: list[int]) -> str:
    for iteration in reversed(iterations):
        manifest = run.manifest(iteration, "train")
        if manifest and manifest.extra.get("checkpoint"):
            return str(manifest.extra["checkpoint"])
    return "none"


def status_text(path: Path) -> str:
    """The whole report on a run folder.

    Raises:
        ConfigError: no run there; LedgerError: a damaged manifest.
    """
    run = Run(path, load_run_config(path))
    folders = sorted(run.path.glob("iter_[0-9]*"))
    iterations = sorted(int(folder.name.removeprefix("iter_")) for folder in folders if folder.name[5:].isdigit())
    lines = [f"run {run.path}: {activity_line(read_status(run.path))}"]
    lines += _table([HEADER] + [iteration_row(run, iteration) for iteration in iterations])
    trained = sum(run.manifest(iteration, "train") is not None for iteration in iterations)
    lines.append(f"{trained} of {run.config.iterations} iterations done; last checkpoint: "
                 f"{_last_checkpoint(run, iterations)}")  # fmt: skip
    return "\n".join(lines)


def status_command(argv: list[str] | None = None) -> int:
    """`status RUN [--watch]`."""
    set_stage("status")
    parser = argparse.ArgumentParser(
        prog="python -m unified_rl.ledger", epilog="example:\n  python -m unified_rl.ledger status runs/demo --watch",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("command", choices=["status"], help="status: print what is done and what is being done")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--watch", action="store_true", help=f"print again every {WATCH_SECONDS:.0f} s until Ctrl-C")
    arguments = parser.parse_args(argv)
    print(status_text(arguments.run), flush=True)
    try:
        while arguments.watch:
            time.sleep(WATCH_SECONDS)
            clear = "\033[H\033[2J" if sys.stdout.isatty() else "\n"
            print(clear + status_text(arguments.run), flush=True)
    except KeyboardInterrupt:
        pass
    return EXIT_OK
