"""Drawing by the rollout stage against drawing inside the ZeRO-3 engine that trains, on two ranks.

Every rank draws G images of a prompt of its own. Ours: whole weights on each rank, nothing to wait for. Theirs: the
model of the training engine, its weights partitioned over the ranks, in transformers' sampling loop. Every step of it
gathers all weights through the engine's hooks (`gathered by step`), or they are gathered once and the loop runs
without hooks (`gathered once`), in the memory that partitioning is to save. Both sides are timed from one barrier to
the next, and theirs has to give the log-probs of our tokens.

example: python -m benchmarks.rollout_engine --width 512 --layers 8 --group 8 --repeats 3
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks import measuring, rollout_tokens
from benchmarks.measuring import Row
from benchmarks.models import janus
from unified_rl.backbones.base import TokenTraj
from unified_rl.launching import free_port
from unified_rl.runtime import current_ranks
from unified_rl.train import zero3

ROOT = Path(__file__).parents[1]
TARGET = 5.0


def together(function: Callable[[], TokenTraj | torch.Tensor]) -> TokenTraj | torch.Tensor:
    """Its result, once all ranks have theirs."""
    zero3.barrier()
    result = function()
    zero3.barrier()
    return result


def measure(arguments: Namespace) -> list[Row]:
    """The rows, by one of the ranks."""
    zero3.init_process_group(current_ranks(), "cpu")
    torch.set_num_threads(arguments.threads)
    shape, scale, group = (arguments.width, arguments.layers, arguments.side), arguments.scale, arguments.group
    whole, trained = janus(*shape), janus(*shape)
    for parameter in trained.model.model.language_model.layers.parameters():
        parameter.requires_grad_()
    ds_config = zero3.load_ds_config("zero3_cpu", "float32", 1, 1, arguments.ranks, 1.0)
    engine = zero3.Zero3Engine(trained.model, ds_config)
    weights = list(trained.model.parameters())

    def by_step() -> torch.Tensor:
        return rollout_tokens.theirs(trained, group, scale)

    def once() -> torch.Tensor:
        with zero3.gathered(weights):
            return rollout_tokens.theirs(whole, group, scale)  # the same numbers, in a module that has no hooks

    rows = []
    for name, theirs, target in (("by step", by_step, TARGET), ("once", once, None)):
        sides = (partial(together, side) for side in (partial(rollout_tokens.ours, whole, group, scale), theirs))
        fast, slow, drawn, _ = measuring.compare(*sides, arguments.repeats)
        case = f"{arguments.ranks} ranks, G = {group}, CFG {scale:g}, gathered {name}"
        rows.append(Row("rollout, engine", case, slow / fast, target, fast, slow))
    worst = rollout_tokens.difference(trained, drawn, scale)
    if worst > rollout_tokens.TOLERANCE[torch.float32]:
        raise SystemExit(f"the engine does not draw from the same distribution: {worst:.1e}")
    engine.close()
    zero3.leave_process_group()
    return rows


def start(arguments: Namespace, argv: list[str], out: Path) -> None:
    """All ranks; the first writes its rows to `out`."""
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.rollout_engine", *argv, "--rows", str(out)]
    processes = []
    for rank in map(str, range(arguments.ranks)):
        environment = {**common, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(arguments.ranks)}
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT))
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit("a rank failed")


def main(argv: list[str] | None = None) -> None:
    """Both ways to gather."""
    argv = sys.argv[1:] if argv is None else argv
    parser = measuring.parser(__doc__)
    parser.add_argument("--width", type=int, default=512, help="of the language model, a multiple of 256")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--side", type=int, default=24, help="rows and columns of image tokens")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--scale", type=float, default=5.0, help="of guidance")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=Path, metavar="FILE", help="be a rank, and write the rows there")
    arguments = parser.parse_args(argv)
    if arguments.rows:
        rows = measure(arguments)
        if current_ranks().rank == 0:
            arguments.rows.write_text(json.dumps([vars(row) for row in rows]))
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        start(arguments, argv, out)
        measuring.report([Row(**row) for row in json.loads(out.read_text())], arguments.out)


if __name__ == "__main__":
    main()
