"""A whole iteration of the tiny GvU loop against the sum of its stages' compute.

`ours` is what the launchers take for rollout, reward and train as the loop starts them, each before its turn: shells,
interpreters, imports, and the waiting between. `theirs` is the compute: the same stages in a process that has imported
everything before the clock starts, each with its reading and writing, its model's weights and its engine. Both work on
an iteration of a run of their own, with one worker and one rank; the weights that come out have to be the same bits.
A stage of ours ends with its manifest, the last one with the launchers.

The clock of `--clock cpu` counts the CPU seconds of the launchers and all that they start, of the whole alone.

example: python -m benchmarks.iteration --prompts 256 --repeats 3
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from benchmarks import measuring
from benchmarks.measuring import Row
from unified_rl.config import load_run_config, open_run
from unified_rl.ledger import Run
from unified_rl.manifests import MANIFEST_NAME, Manifest, write_manifest
from unified_rl.runtime import Ranks
from unified_rl.shapes.prompts import prompt_records
from unified_rl.shards import write_records

ROOT = Path(__file__).parents[1]
STAGES = ("rollout", "reward", "train")
WHOLE = "whole"
# What loop.sh does for an iteration.
LOOP = 'source "$0"; parse_arguments "$@"; find_python; stage rollout+reward+train --run "$RUN" --iteration 0'
IMPORTED = (
    "deepspeed", "peft", "torch._dynamo", "unified_rl.backbones.load", "unified_rl.reward.judges",
    "unified_rl.rollout.stage", "unified_rl.reward.stage", "unified_rl.train.stage",
)  # fmt: skip
MOST = 1.25
Seconds = dict[str, float]


def cpu_seconds() -> float:
    """Of this process and of all that it started and that has ended."""
    return sum(os.times()[:4])


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": cpu_seconds}


def new_run(folder: Path, prompts: Path, arguments: Namespace) -> Path:
    """A run of the recipe of `make demo` with one worker."""
    run = Path(tempfile.mkdtemp(dir=folder))
    open_run(
        run, "gvu_janus_shapes",
        [f"data.prompts={prompts}", f"data.prompts_per_iteration={arguments.prompts}", "rollout.workers=1",
         "reward.workers=1", "train.ranks=1", f"backbone.threads={arguments.threads}"],
    )  # fmt: skip
    return run


def launched(run: Path, clock: str) -> Seconds:
    """Seconds of the iteration, and of each stage, by the launchers."""
    command = ["bash", "-c", LOOP, ROOT / "launch" / "common.sh", "--run", run]
    start, began = CLOCKS[clock](), time.time()
    subprocess.run(command, check=True, env={**os.environ, "PYTHON": sys.executable}, stderr=subprocess.DEVNULL)
    seconds, ended = {WHOLE: CLOCKS[clock]() - start}, time.time()
    folders = [Run(run, load_run_config(run)).stage_folder(0, stage) for stage in STAGES[:-1]]
    ends = [(folder / MANIFEST_NAME).stat().st_mtime for folder in folders] + [ended]
    return seconds | {stage: end - start for stage, start, end in zip(STAGES, [began, *ends], ends, strict=False)}


def computed(run: Path, clock: str) -> Seconds:
    """Seconds of each stage's compute."""
    command = [sys.executable, "-m", "benchmarks.iteration", "--compute", run, "--clock", clock]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def compute(path: Path, clock: str) -> Seconds:
    """The stages in this process."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in IMPORTED:
        importlib.import_module(name)
    run, seconds = Run(path, load_run_config(path)), {}
    for stage in STAGES:
        function = getattr(importlib.import_module(f"unified_rl.{stage}.stage"), stage)
        start = CLOCKS[clock]()
        if function(run, 0, Ranks(0, 0, 1)):
            raise SystemExit(f"{stage} failed")
        seconds[stage] = CLOCKS[clock]() - start
    return {WHOLE: sum(seconds.values()), **seconds}


def weights(path: Path) -> str:
    """SHA-256 of the policy that the iteration made."""
    return Run(path, load_run_config(path)).require_manifest(0, "train").extra["policy_sha256"]


def rows(arguments: Namespace, folder: Path) -> list[Row]:
    """The iteration, and each stage."""
    prompts = folder / "prompts"
    prompts.mkdir()
    records = prompt_records("train")
    info = write_records(prompts / "prompts-00000.tar", records)
    write_manifest(prompts, Manifest("prompts", 0, [info], "base", "", {"prompts": len(records)}))
    found: tuple[list[Seconds], list[Seconds]] = ([], [])
    digests = set()
    for _ in range(arguments.repeats):
        for side, function in enumerate((launched, computed)):
            run = new_run(folder, prompts, arguments)
            found[side].append(function(run, arguments.clock))
            digests.add(weights(run))
    if len(digests) != 1:
        raise SystemExit("launchers and compute train other weights")
    made = []
    for name in (WHOLE, *STAGES) if arguments.clock == "wall" else (WHOLE,):
        ours, theirs = (statistics.median(one[name] for one in side) for side in found)
        case, target = f"{name}, {arguments.prompts} prompts, at most", MOST if name == WHOLE else None
        made.append(Row("iteration", case, ours / theirs, target, ours, theirs))
    return made


def main(argv: list[str] | None = None) -> None:
    """A row for the iteration and one for each stage."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--prompts", type=int, default=256, help="of the iteration; 8 images each")
    parser.add_argument("--compute", type=Path, metavar="RUN", help="print the seconds of each stage's compute alone")
    arguments = parser.parse_args(argv)
    if arguments.compute:
        print(json.dumps(compute(arguments.compute, arguments.clock)))
        return
    folder = Path(tempfile.mkdtemp())
    try:
        measuring.report(rows(arguments, folder), arguments.out)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
