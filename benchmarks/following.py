"""Rollout and reward by two processes: reward beside its rollout (`--follow`) against reward after it.

Real stages of the tiny Janus, started as the launchers start them. Both sides must leave the same bytes. The limit is
the longer one of the two stages alone, its start included. Needs two idle cores: on a busy machine both are as slow.

example: python -m benchmarks.following --prompts 64 --per-shard 4 --repeats 3
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import measuring
from benchmarks.measuring import Row
from unified_rl.config import open_run
from unified_rl.manifests import Manifest, write_manifest
from unified_rl.shapes.prompts import prompt_records
from unified_rl.shards import write_records

STAGES = ("rollout", "reward")


def start(run: Path, stage: str, *options: str) -> subprocess.Popen[bytes]:
    """One worker of a stage."""
    command = [sys.executable, "-m", f"unified_rl.{stage}", "--run", str(run), "--iteration", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def seconds_of(run: Path, follow: bool) -> list[float]:
    """Wall-clock seconds from the start to the end of rollout, and of reward."""
    begun = time.perf_counter()
    ended = []
    processes = [start(run, "rollout"), start(run, "reward", "--follow")] if follow else []
    for number, stage in enumerate(STAGES):
        process = processes[number] if follow else start(run, stage)
        if process.wait():
            raise SystemExit(f"{stage} of {run} ended with {process.returncode}")
        ended.append(time.perf_counter())
    return [ended[0] - begun, ended[1] - (begun if follow else ended[0])]


def content(run: Path) -> dict[str, bytes]:
    """Everything that both stages wrote."""
    folder = run / "iter_0000"
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--per-shard", type=int, default=8, help="prompts, of eight images each")
    arguments = parser.parse_args(argv)
    together, alone = [], []
    with tempfile.TemporaryDirectory() as name:
        prompts = Path(name) / "prompts"
        prompts.mkdir()
        info = write_records(prompts / "prompts-00000.tar", prompt_records("train")[: arguments.prompts])
        write_manifest(prompts, Manifest("prompts", 0, [info], "base", "", {"prompts": arguments.prompts}))
        for repeat in range(arguments.repeats):
            runs = [Path(name) / f"{side}-{repeat}" for side in ("follow", "after")]
            for run in runs:
                open_run(
                    run, "gvu_janus_shapes",
                    [f"data.prompts={prompts}", f"data.prompts_per_iteration={arguments.prompts}",
                     f"rollout.groups_per_shard={arguments.per_shard}", "rollout.workers=1", "reward.workers=1"],
                )  # fmt: skip
            together.append(max(seconds_of(runs[0], True)))
            alone.append(seconds_of(runs[1], False))
            print(f"beside {together[-1]:.1f} s, after {alone[-1][0]:.1f} + {alone[-1][1]:.1f} s", flush=True)
            if content(runs[0]) != content(runs[1]):
                raise SystemExit("reward beside its rollout wrote other bytes than reward after it")
    ours, theirs = statistics.median(together), statistics.median(map(sum, alone))
    least = statistics.median(map(max, alone))
    case = f"{arguments.prompts} prompts, {arguments.per_shard} a shard, two processes"
    measuring.report([Row("following", case, theirs / ours, None, ours, theirs, least / ours)], arguments.out)


if __name__ == "__main__":
    main()
