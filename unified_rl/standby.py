"""A stage that the loop starts before its turn, so that its shells, launchers and imports take no time of their own.

Its launcher waits until the stage before is at work (has its first shard; training has begun), then starts the
processes; these import what they need, then wait until that stage is committed.

    python -m unified_rl.standby --run RUN   returns when the stage before is at work
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module

from unified_rl.config import load_run_config
from unified_rl.ledger import Run
from unified_rl.runtime import EXIT_OK, EXIT_STOPPED, StopRequest, run_stage, stage_arguments

VARIABLE = "STANDBY"  # STAGE:ITERATION:PID, the stage before and the loop's shell; not set where nobody is to wait
POLL_SECONDS = 0.1


def stand_by(run: Run, *modules: str) -> None:
    """Import `modules` and wait until the stage before is committed, if this process was started before its turn.

    Raises:
        SystemExit: EXIT_STOPPED, on a request to stop, or when the loop is gone, which nobody tells its children.
    """
    if VARIABLE in os.environ:
        for module in modules:
            import_module(module)
        with socket.socket() as port:
            training = os.environ[VARIABLE].startswith("reward:")  # workers of other stages have a RANK, too
            if training and os.environ.get("RANK") == "0" and "MASTER_PORT" in os.environ:
                # It was free when the launcher chose it; bound, it is nobody else's until the ranks meet there.
                with suppress(OSError):
                    port.bind(("", int(os.environ["MASTER_PORT"])))
            _wait(lambda stage, iteration: run.manifest(iteration, stage) is not None)


def _wait(done: Callable[[str, int], bool]) -> None:
    stage, iteration, loop = os.environ[VARIABLE].split(":")
    with StopRequest() as stop:
        while not done(stage, int(iteration)):
            if stop.requested or not _is_alive(int(loop)):
                raise SystemExit(EXIT_STOPPED)
            time.sleep(POLL_SECONDS)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, PermissionError):  # or the number is another user's by now
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    """Command line; see the module's text."""
    arguments = stage_arguments("standby", "python -m unified_rl.standby --run runs/demo", argv, iteration=False)
    run = Run(arguments.run, load_run_config(arguments.run))

    def at_work(stage: str, iteration: int) -> bool:
        folder = run.iteration_folder(iteration) / stage
        signs = folder.exists() if stage == "train" else any(folder.glob("shard-*.done.json"))
        return signs or run.manifest(iteration, stage) is not None

    if VARIABLE in os.environ:
        _wait(at_work)
    return EXIT_OK


if __name__ == "__main__":
    run_stage(main)
