"""What the benchmarks share: fair timing of two sides, this machine's limits, and the rows of the summary."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

SUMMARY = Path("runs/bench/summary.json")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Ours, Theirs = TypeVar("Ours"), TypeVar("Theirs")


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        ratio: theirs over ours for times, so that more is better; ours over theirs where `case` ends with "at most".
        target: of the ratio; None where nothing is promised.
        ours, theirs: seconds, or what `case` says.
        limit_fraction: share of what this machine could do, measured in the same run; None where no limit is known.
    """

    table: str
    case: str
    ratio: float
    target: float | None
    ours: float
    theirs: float
    limit_fraction: float | None = None

    @property
    def at_most(self) -> bool:
        """Whether less is better."""
        return self.case.endswith("at most")

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.target is None or (self.ratio <= self.target if self.at_most else self.ratio >= self.target)

    def __str__(self) -> str:
        target = "" if self.target is None else f"target {self.target:g} {'met' if self.met else 'MISSED'}"
        limit = "" if self.limit_fraction is None else f"{100 * self.limit_fraction:.0f} % of the limit"
        return (
            f"{self.table:16s}  {self.case:44s}  ratio {self.ratio:6.2f}  ours {self.ours:9.4g}  "
            f"theirs {self.theirs:9.4g}  {target:20s}  {limit}"
        ).rstrip()


def parser(description: str, repeats: int = 3) -> argparse.ArgumentParser:
    """Arguments that all benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=repeats)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="cpu: on a busy machine, with one thread")
    made.add_argument("--out", type=Path, default=SUMMARY, help="summary that the rows are put into")
    return made


def compare(
    ours: Callable[[], Ours], theirs: Callable[[], Theirs], repeats: int, clock: str = "wall", warm: bool = False
) -> tuple[float, float, Ours, Theirs]:
    """Median seconds and last results of both sides, after one warm-up call of each unless they are `warm` already.

    They take turns, so that whatever else the machine does disturbs both.
    """
    sides, seconds = (ours, theirs), ([], [])
    results = [None, None] if warm else [ours(), theirs()]
    for _ in range(repeats):
        for side, function in enumerate(sides):
            synchronise()
            start = CLOCKS[clock]()
            results[side] = function()
            synchronise()
            seconds[side].append(CLOCKS[clock]() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1]), *results


def median_seconds(function: Callable[[], object], repeats: int, clock: str = "wall") -> float:
    """Of one side, after a warm-up call."""
    return compare(function, lambda: None, repeats, clock)[0]


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _best(function: Callable[[], object], clock: str, repeats: int = 5) -> float:
    function()
    times = []
    for _ in range(repeats):
        synchronise()
        start = CLOCKS[clock]()
        function()
        synchronise()
        times.append(CLOCKS[clock]() - start)
    return min(times)


@dataclass(frozen=True)
class Limits:
    """What this machine reaches: bytes a second of large reads, operations a second of large matrix products."""

    bandwidth: float
    matrix_rate: float

    @classmethod
    def measured(cls, device: str = "cpu", dtype: torch.dtype = torch.float32, clock: str = "wall") -> Limits:
        """With this many threads, on this clock; the best of five."""
        numbers, side = (1 << 25, 1536) if device == "cpu" else (1 << 30, 8192)
        vector = torch.ones(numbers, device=device, dtype=dtype)
        matrix = torch.ones(side, side, device=device, dtype=dtype)
        reading = _best(vector.max, clock)
        product = _best(lambda: matrix @ matrix, clock)
        return cls(vector.numel() * vector.element_size() / reading, 2 * side**3 / product)

    def seconds(self, operations: float, read: float = 0.0) -> float:
        """Least time for this much work: both limits can be used at once."""
        return max(operations / self.matrix_rate, read / self.bandwidth)

    def __str__(self) -> str:
        return f"limits: {self.bandwidth / 1e9:.1f} GB/s, {self.matrix_rate / 1e9:.1f} GFLOP/s"


def operations(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in one call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def weight_bytes(*modules: torch.nn.Module) -> int:
    """Bytes of all parameters."""
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def report(rows: Sequence[Row], out: Path) -> None:
    """Print rows, and put them into the summary in place of earlier ones of the same table and case."""
    for row in rows:
        print(row, flush=True)
    new = {(row.table, row.case): asdict(row) for row in rows}
    kept = json.loads(out.read_text()) if out.is_file() else []
    kept = [entry for entry in kept if (entry["table"], entry["case"]) not in new]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([*kept, *new.values()], indent=1) + "\n")
