"""Ranks of a train stage without the launcher: `python driver.py OUT SCENARIO...`, one process per rank.

Several scenarios share one start. A scenario is `RUN:ITERATION`, or `RUN:ITERATION:ACTION` to be signalled on the last
rank: `stop` before the first step, `late` before the first policy is written. Writes the exit code or the error of
each to OUT.RANK.json.
"""

import json
import os
import signal
import sys

from unified_rl.config import load_run_config
from unified_rl.ledger import Run
from unified_rl.runtime import StageError, current_ranks
from unified_rl.train import stage, zero3

ACTIONS = {"stop": "make_updater", "late": "export_policy"}


def signalled(function):
    def wrapped(*arguments):
        if current_ranks().rank == current_ranks().world_size - 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return function(*arguments)

    return wrapped


def play(scenario: str) -> int | str:
    path, iteration, *actions = scenario.split(":")
    functions = {ACTIONS[action]: getattr(stage, ACTIONS[action]) for action in actions}
    for name, function in functions.items():
        setattr(stage, name, signalled(function))
    try:
        return stage.train(Run(path, load_run_config(path)), int(iteration), current_ranks())
    except StageError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for name, function in functions.items():
            setattr(stage, name, function)


if __name__ == "__main__":
    out, *scenarios = sys.argv[1:]
    zero3.init_process_group(current_ranks(), "cpu")
    # The group is joined once for all scenarios.
    leave, zero3.leave_process_group = zero3.leave_process_group, zero3.barrier
    results = [play(scenario) for scenario in scenarios]
    leave()
    with open(f"{out}.{current_ranks().rank}.json", "w") as file:
        json.dump(results, file)
