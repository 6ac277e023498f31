"""Memory of real optimiser steps: `python memory_driver.py OUT RUN...`, one process.

Tensor accounting: all tensors that exist before the step, plus the most bytes that torch's allocator had handed out
at once during it. The resident set would add the interpreter and the libraries, several times a tiny model.
Writes a list of bytes, one for each run, to OUT.0.json.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from unified_rl.config import load_run_config
from unified_rl.ledger import Run
from unified_rl.runtime import current_ranks
from unified_rl.train import stage, zero3
from unified_rl.train.samples import load_iteration


def storages() -> dict[int, torch.UntypedStorage]:
    """Of all tensors that exist; holding the result keeps them."""
    gc.collect()
    found = {}
    for value in gc.get_objects():
        if type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_meta:
            storage = value.untyped_storage()
            found[storage._cdata] = storage
    return found


def most_during(work) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def measure(path: str) -> int:
    run, ranks = Run(path, load_run_config(Path(path))), current_ranks()
    earlier = storages()  # engines of earlier runs, which DeepSpeed does not let go
    data = load_iteration(run, 0)
    trainer = stage.start(run, "", -1, ranks)
    groups = list(range(run.config.train.groups_per_step))
    updater = stage.make_updater(run, ranks, trainer, data, [groups])
    updater.step(groups, 0, check_ratio=True)
    before = sum(storage.nbytes() for key, storage in storages().items() if key not in earlier)
    return before + most_during(lambda: updater.step(groups, 1, check_ratio=False))


if __name__ == "__main__":
    zero3.init_process_group(current_ranks(), "cpu")
    found = [measure(path) for path in sys.argv[2:]]
    Path(f"{sys.argv[1]}.0.json").write_text(json.dumps(found))
