"""All tables in one go: `make bench` on a CPU, `make bench-gpu` on a GPU.

    python -m benchmarks [--clock cpu]     tables that fit a CPU, into runs/bench/summary.json
    python -m benchmarks --gpu [--smoke]   public shapes in bf16, into runs/bench/summary_gpu.json

`--smoke` runs the scripts of the GPU's tables small, on the CPU, to see that they work; nothing is measured then.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measuring import SUMMARY

GPU_SUMMARY = SUMMARY.with_name("summary_gpu.json")
CPU = (
    "rollout_tokens --layers 4 --repeats 1",
    "rollout_flow --layers 2",
    "rollout_engine --layers 4 --side 8 --repeats 1",
    "reward --repeats 3",
    "questions --layers 4 --repeats 3",
    "training_step --work images",
    "training_step --groups 1 --work texts",
    "iteration --prompts 192 --repeats 1",
    "growth",
)
CUDA = "--device cuda --dtype bfloat16"
JANUS = ("--width 2048 --layers 24 --head 128", "--width 4096 --layers 30 --head 128")  # Janus-Pro-1B, 7B
BAGEL = "--width 3584 --layers 28 --head 128 --share 7 --side 64"  # 1024 x 1024 pixels
GPU = (
    *(f"rollout_tokens {shape} --group {group} {CUDA}" for shape in JANUS for group in (16, 128)),
    f"rollout_flow {BAGEL} --prompts 1 --steps 49 {CUDA}",
    *(f"reward {shape} --side 24 {CUDA}" for shape in JANUS),
    *(f"training_step {shape} --side 24 {CUDA}" for shape in JANUS),
)
SMOKE = (
    "rollout_tokens --width 256 --layers 1 --side 2 --group 2 --repeats 1",
    "rollout_flow --width 256 --layers 1 --side 2 --prompts 1 --group 2 --steps 3 --repeats 1",
    "reward --width 256 --layers 1 --side 2 --vocabulary 2000 --images 2 --repeats 1",
    "training_step --width 256 --layers 1 --side 2 --vocabulary 2000 --groups 1 --group 2 --answers 2 --repeats 1",
)


def main(argv: list[str] | None = None) -> int:
    """Run them one after the other; 1 when one failed. A missed target is no failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--clock", default="wall")
    arguments = parser.parse_args(argv)
    lines = (SMOKE if arguments.smoke else GPU) if arguments.gpu else CPU
    out = GPU_SUMMARY if arguments.gpu else SUMMARY
    out = out.with_name("smoke.json") if arguments.smoke else out
    out.unlink(missing_ok=True)
    started, failed = time.monotonic(), []
    for line in lines:
        name, *options = line.split()
        print(f"== {line}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", *options, "--clock", arguments.clock, "--out", str(out)]
        if subprocess.run(command, cwd=Path(__file__).parents[1]).returncode:
            failed.append(line)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes, {out}; failed: {', '.join(failed) or 'none'}")
    if arguments.smoke:
        print("the tables of a GPU were not measured: this was a smoke run on the CPU")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
