"""A whole iteration of the tiny GvU loop against the sum of its stages' compute.

`ours` is what an iteration takes in the loop, from the commit of one training to that of the next: shells,
interpreters, imports, and the waiting between. `theirs` is the compute: the same stages in a process that has imported
everything before the clock starts, each with its reading and writing, its model's weights and its engine. Both work on
two iterations of a run of their own, with one worker and one rank; the weights that come out have to be the same bits.
The second iteration counts. The first, whose start nothing can hide, is a row of its own.

The clock is the wall's alone: `--clock` changes nothing.

example: python -m benchmarks.iteration --prompts 256 --repeats 2
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
from itertools import pairwise
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
WHOLE, FIRST = "whole", "first of a loop"
ITERATIONS = 2
IMPORTED = (
    "deepspeed", "peft", "torch._dynamo", "unified_rl.backbones.load", "unified_rl.reward.judges",
    "unified_rl.rollout.stage", "unified_rl.reward.stage", "unified_rl.train.stage",
)  # fmt: skip
MOST = 1.25
Seconds = dict[str, float]


def new_run(folder: Path, prompts: Path, arguments: Namespace) -> Path:
    """A run of the recipe of `make demo` with one worker."""
    run = Path(tempfile.mkdtemp(dir=folder))
    open_run(
        run, "gvu_janus_shapes",
        [f"data.prompts={prompts}", f"data.prompts_per_iteration={arguments.prompts}", "rollout.workers=1",
         "reward.workers=1", "train.ranks=1", f"backbone.threads={arguments.threads}", "evaluate.prompts=",
         f"iterations={ITERATIONS}"],
    )  # fmt: skip
    return run


def launched(run: Path) -> Seconds:
    """Seconds of the first and of the second iteration, and of each stage of the second, by the loop."""
    command, began = [ROOT / "launch" / "loop.sh", "--run", run], time.time()
    subprocess.run(
        command, check=True, env={**os.environ, "PYTHON": sys.executable}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    made = Run(run, load_run_config(run))
    ends = [(made.stage_folder(k, s) / MANIFEST_NAME).stat().st_mtime for k in range(ITERATIONS) for s in STAGES]
    first, second = ends[: len(STAGES)], ends[len(STAGES) :]
    seconds = [end - start for start, end in pairwise([first[-1], *second])]
    return {WHOLE: sum(seconds), FIRST: first[-1] - began, **dict(zip(STAGES, seconds, strict=True))}


def computed(run: Path) -> Seconds:
    """The same, of the compute."""
    first, second = (compute_in_a_process(run, iteration) for iteration in range(ITERATIONS))
    return {WHOLE: sum(second.values()), FIRST: sum(first.values()), **second}


def compute_in_a_process(run: Path, iteration: int) -> Seconds:
    """Seconds of each stage; once weights are partitioned, their process draws no more."""
    command = [sys.executable, "-m", "benchmarks.iteration", "--compute", run, "--iteration", str(iteration)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def compute(path: Path, iteration: int) -> Seconds:
    """The stages in this process."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in IMPORTED:
        importlib.import_module(name)
    run, seconds = Run(path, load_run_config(path)), {}
    for stage in STAGES:
        function = getattr(importlib.import_module(f"unified_rl.{stage}.stage"), stage)
        start = time.perf_counter()
        if function(run, iteration, Ranks(0, 0, 1)):
            raise SystemExit(f"{stage} failed")
        seconds[stage] = time.perf_counter() - start
    return seconds


def weights(path: Path) -> str:
    """SHA-256 of the policy that the iteration made."""
    return Run(path, load_run_config(path)).require_manifest(ITERATIONS - 1, "train").extra["policy_sha256"]


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
            found[side].append(function(run))
            digests.add(weights(run))
    if len(digests) != 1:
        raise SystemExit("launchers and compute train other weights")
    made = []
    for name in (WHOLE, FIRST, *STAGES):
        ours, theirs = (statistics.median(one[name] for one in side) for side in found)
        case, target = f"{name}, {arguments.prompts} prompts, at most", MOST if name == WHOLE else None
        made.append(Row("iteration", case, ours / theirs, target, ours, theirs))
    return made


def main(argv: list[str] | None = None) -> None:
    """A row for the iteration and one for each stage."""
    parser = measuring.parser(__doc__, repeats=2)
    parser.add_argument("--prompts", type=int, default=256, help="of the iteration; 8 images each")
    parser.add_argument("--compute", type=Path, metavar="RUN", help="print the seconds of each stage's compute alone")
    parser.add_argument("--iteration", type=int, default=0, help="whose seconds `--compute` prints")
    arguments = parser.parse_args(argv)
    if arguments.compute:
        print(json.dumps(compute(arguments.compute, arguments.iteration)))
        return
    folder = Path(tempfile.mkdtemp())
    try:
        measuring.report(rows(arguments, folder), arguments.out)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
