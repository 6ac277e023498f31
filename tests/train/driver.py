"""Ranks of a train stage without the launcher: `python driver.py OUT SCENARIO...`, one process per rank.

Several scenarios share one start. A scenario is `RUN:ITERATION`, or `RUN:ITERATION:stop` to be signalled on the last
rank before the first step. Writes the exit code or the error of each to OUT.RANK.json.
"""

import json
import os
import signal
import sys

from unified_rl.config import load_run_config
from unified_rl.ledger import Run
from unified_rl.runtime import StageError, current_ranks
from unified_rl.train import stage, zero3


def signalled(make_updater):
    def wrapped(*arguments):
        if current_ranks().rank == current_ranks().world_size - 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return make_updater(*arguments)

    return wrapped


def play(scenario: str) -> int | str:
    path, iteration, *action = scenario.split(":")
    make_updater = stage.make_updater
    if action:
        stage.make_updater = signalled(make_updater)
    try:
        return stage.train(Run(path, load_run_config(path)), int(iteration), current_ranks())
    except StageError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        stage.make_updater = make_updater


if __name__ == "__main__":
    out, *scenarios = sys.argv[1:]
    zero3.init_process_group(current_ranks(), "cpu")
    # The group is joined once for all scenarios.
    zero3.init_process_group = lambda ranks, device: None
    leave, zero3.leave_process_group = zero3.leave_process_group, zero3.barrier
    results = [play(scenario) for scenario in scenarios]
    leave()
    with open(f"{out}.{current_ranks().rank}.json", "w") as file:
        json.dump(results, file)
