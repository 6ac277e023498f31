"""The state of a run as text: what is done in every iteration, what is being done, how long it will take."""

from __future__ import annotations

import datetime
import fcntl
import os
import re
import socket
import struct
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from unified_rl.config import load_run_config
from unified_rl.ledger import LOCKS, Run, read_status
from unified_rl.manifests import MANIFEST_NAME, Manifest, read_json
from unified_rl.runtime import EXIT_OK, command_parser, format_seconds, set_stage

STAGES = ("rollout", "reward", "train")
HEADER = ("iteration", *STAGES, "images", "failed", "reward", "policy")
DETAILS = ("stage", "shards", "images", "failed", "images/s", "eta")
WATCH_SECONDS = 2.0
SHOWN_ITERATIONS = 20
RECENT_MARKS = 20  # that a rate is taken from
SILENT_SECONDS = 600.0  # after which another host's process may be dead
QUIET_SECONDS = 60.0  # that may pass between two stages
FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux


def rollout_shards(run: Run) -> int:
    """Number of rollout shards of an iteration, from the configuration."""
    return -(-run.config.data.prompts_per_iteration // run.config.rollout.groups_per_shard)


def _stage_cell(run: Run, iteration: int, stage: str, manifest: Manifest | None, total: int) -> str:
    if manifest is not None:
        removed = " removed" if manifest.shards_removed else ""
        return "done" if stage == "train" else f"{len(manifest.shards)}/{len(manifest.shards)}{removed}"
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


@dataclass(frozen=True)
class Progress:
    """What the marks of a stage of rollout or reward say.

    `rate` is images per second of all workers together over the last marks, None before there are two.
    """

    shards: int
    total: int
    images: int
    failed: int
    rate: float | None

    @property
    def eta(self) -> float | None:
        """Seconds left."""
        if self.rate is None or not self.shards:
            return None
        return (self.total - self.shards) * self.images / self.shards / self.rate


def marked_progress(folder: Path, total: int) -> Progress:
    """From the marks in `folder` and the times at which they were written."""
    written = []
    for path in folder.glob("shard-*.done.json"):
        try:
            written.append((path.stat().st_mtime, read_json(path)))
        except OSError:  # removed in between
            continue
    marks = sorted(((when, mark) for when, mark in written if mark is not None), key=lambda pair: pair[0])
    counts = [mark["shard"]["count"] for _, mark in marks]
    recent = marks[-RECENT_MARKS:]
    seconds = recent[-1][0] - recent[0][0] if recent else 0.0
    rate = sum(counts[-len(recent) + 1 :]) / seconds if len(recent) > 1 and seconds > 0 else None
    failed = sum(int(mark["summary"].get("failed", 0)) for _, mark in marks)
    return Progress(len(marks), total, sum(counts), failed, rate)


def details(run: Run, iteration: int, status: dict | None) -> list[tuple[str, ...]]:
    """A line for each stage of one iteration that has begun: shards, images, failures, rate, time left."""
    rollout = run.manifest(iteration, "rollout")
    total = len(rollout.shards) if rollout else rollout_shards(run)
    rows = []
    for stage in ("rollout", "reward"):
        folder = run.iteration_folder(iteration) / stage
        manifest = run.manifest(iteration, stage)
        if not folder.is_dir() or (manifest and manifest.shards_removed):
            continue
        p = marked_progress(folder, total)
        eta = "done" if manifest else _seconds(p.eta)
        rows.append((stage, f"{p.shards}/{p.total}", str(p.images), str(p.failed), _number(p.rate), eta))
    told = status if status and (status.get("stage"), status.get("iteration")) == ("train", iteration) else None
    if told and told.get("total") and run.manifest(iteration, "train") is None:
        rows.append(("train", f"{told.get('done')}/{told['total']} steps", "", "", "", _seconds(told.get("eta_s"))))
    return rows


def _seconds(value: object) -> str:
    return format_seconds(value) if isinstance(value, (int, float)) else "?"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}"


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


def _silence(status: dict | None) -> float:
    """Seconds since the status was written; infinite when it does not say."""
    try:
        then = datetime.datetime.fromisoformat(status["updated"])
        return (datetime.datetime.now(datetime.timezone.utc) - then).total_seconds()
    except (KeyError, TypeError, ValueError):
        return float("inf")


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
    silence = _silence(status)
    age = format_seconds(silence) if silence < float("inf") else "?"
    parts.append(f"{age} ago by process {status.get('pid')} on {status.get('host')}")
    return ", ".join(parts)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock; asks without taking it, so that no worker is ever refused for it."""
    try:
        with open(path, "rb") as file:
            answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(FLOCK, fcntl.F_WRLCK, 0, 0, 0, 0))
    except OSError:
        return False
    return struct.unpack(FLOCK, answer)[0] != fcntl.F_UNLCK


def worker_problems(run: Run, silent: float) -> list[str]:
    """Workers that failed, were killed, or hold a lock although they are dead.

    Args:
        silent: seconds since the run's status was last written.
    """
    problems = []
    for path in sorted((run.path / LOCKS).glob("*.lock")):
        lines = path.read_text(errors="replace").splitlines()
        found = re.fullmatch(r"host (.*), process (\d+)", lines[0]) if lines else None
        if found is None:
            continue
        name, owner = path.stem, {"host": found[1], "pid": int(found[2])}
        folders = "evaluation/iter_*" if name.startswith("evaluation") else f"iter_*/{name.split('-')[0]}"
        committed = (manifest.stat().st_mtime for manifest in run.path.glob(f"{folders}/{MANIFEST_NAME}"))  # if needed
        who = f"{name}: process {found[2]} on {found[1]}"
        if is_locked(path):
            if not _alive(owner):
                problems.append(f"{who} is gone, but its lock is held: delete {path}")
            elif found[1] != socket.gethostname() and silent > SILENT_SECONDS:
                problems.append(
                    f"{who} holds its lock and has said nothing for over {SILENT_SECONDS / 60:.0f} minutes: look at "
                    f"that host; if it is down, delete {path}"
                )
        elif path.stat().st_mtime > max(committed, default=0.0):
            failure = next((line for line in lines if line.startswith("failed: ")), None)
            gone = "was killed, or its host keeps locks to itself (see `make doctor`); the same command continues"
            problems.append(f"{who} {failure or gone}")
    return problems


def missing_stages(run: Run, iterations: list[int]) -> list[str]:
    """Stages without a manifest although a later one has it."""
    order = [(k, stage) for k in iterations for stage in STAGES]
    done = [(run.iteration_folder(k) / stage / MANIFEST_NAME).is_file() for k, stage in order]
    last = max((i for i, committed in enumerate(done) if committed), default=-1)
    return [
        f"{stage} of iteration {k} is missing, although {order[last][1]} of iteration {order[last][0]} is committed: "
        "restore its manifest.json, or delete all later stages and run the loop again"
        for (k, stage), committed in zip(order[:last], done[:last], strict=True)
        if not committed
    ]


def blocks(run: Run, iterations: list[int], status: dict | None) -> list[str]:
    """What keeps the run from going on, or who has to start it again."""
    problems = missing_stages(run, iterations) + worker_problems(run, _silence(status))
    working = any(is_locked(path) for path in (run.path / LOCKS).glob("*.lock"))
    between = _silence(status) < QUIET_SECONDS or (_alive(status) if status else False)
    if not (problems or working or between) and (status or {}).get("state") != "finished":
        problems.append(f"nothing runs: `make loop RUN={run.path}` continues")
    return problems


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def status_text(path: Path) -> str:
    """The whole report on a run folder.

    Raises:
        ConfigError: no run there; LedgerError: a damaged manifest.
    """
    run = Run(path, load_run_config(path))
    folders = sorted(run.path.glob("iter_[0-9]*"))
    iterations = sorted(int(folder.name.removeprefix("iter_")) for folder in folders if folder.name[5:].isdigit())
    status = read_status(run.path)
    lines = [f"run {run.path}: {activity_line(status)}"]
    if len(iterations) > SHOWN_ITERATIONS:
        lines.append(f"the last {SHOWN_ITERATIONS} of {len(iterations)} iterations:")
    lines += _table([HEADER] + [iteration_row(run, iteration) for iteration in iterations[-SHOWN_ITERATIONS:]])
    trained = sum((run.iteration_folder(k) / "train" / MANIFEST_NAME).is_file() for k in iterations)
    trainings = (run.manifest(iteration, "train") for iteration in reversed(iterations))
    checkpoint = next((m.extra["checkpoint"] for m in trainings if m and m.extra.get("checkpoint")), "none")
    lines.append(f"{trained} of {run.config.iterations} iterations done; last checkpoint: {checkpoint}")
    last = details(run, iterations[-1], status) if iterations else []
    if last:
        lines += ["", f"iteration {iterations[-1]}:", *_table([DETAILS, *last])]
    lines += [f"blocked: {problem}" for problem in blocks(run, iterations, status)]
    return "\n".join(lines)


def status_command(argv: list[str] | None = None) -> int:
    """`status RUN [--watch]`."""
    set_stage("status")
    parser = command_parser("unified_rl.ledger", None, "python -m unified_rl.ledger status runs/demo --watch")
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
