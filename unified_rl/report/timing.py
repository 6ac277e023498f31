"""Wall-clock seconds of the stages, one JSON object a line in `RUN/timings.jsonl`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from unified_rl.files import named

TIMINGS = "timings.jsonl"


def append_timing(run: Path, stage: str, iteration: int, seconds: float) -> None:
    """Add one line. A single `write` in append mode, so that workers that finish together do not mix their lines."""
    line = json.dumps({"stage": stage, "iteration": iteration, "seconds": round(seconds, 3)}) + "\n"
    descriptor = os.open(Path(run) / TIMINGS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        with named(Path(run) / TIMINGS):
            os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def read_timings(run: Path) -> dict[tuple[str, int], float]:
    """(stage, iteration) -> seconds.

    Two workers that both saw themselves as the last one may have written the same stage twice: the longer time
    counts. A line cut by a crash is passed over.
    """
    path = Path(run) / TIMINGS
    seconds: dict[tuple[str, int], float] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
            key = (str(entry["stage"]), int(entry["iteration"]))
            seconds[key] = max(seconds.get(key, 0.0), float(entry["seconds"]))
        except (ValueError, KeyError, TypeError):
            continue
    return seconds


def seconds_by_stage(run: Path) -> dict[str, float]:
    """Total seconds of each stage, in the order in which the stages first appear."""
    totals: dict[str, float] = {}
    for (stage, _), seconds in read_timings(run).items():
        totals[stage] = totals.get(stage, 0.0) + seconds
    return totals
