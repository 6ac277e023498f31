"""A stage that is started before its turn waits for the one before it, and never outlives its loop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unified_rl.config import open_run
from unified_rl.launching import free_port
from unified_rl.ledger import Run
from unified_rl.manifests import Manifest, write_manifest
from unified_rl.runtime import EXIT_STOPPED
from unified_rl.standby import VARIABLE, main, stand_by

WAITER = """
import sys
from unified_rl.config import load_run_config
from unified_rl.ledger import Run
from unified_rl.standby import stand_by
print("started", flush=True)
stand_by(Run(sys.argv[1], load_run_config(sys.argv[1])), "colorsys")
print("colorsys" in sys.modules, flush=True)
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, open_run(tmp_path, "gvu_janus_shapes", []))


def commit(run: Run, stage: str) -> None:
    folder = run.iteration_folder(0) / stage
    folder.mkdir(parents=True)
    write_manifest(folder, Manifest(stage, 0, [], "base", run.config_hash, {}))


def waiter(run: Run, loop: int, stage: str = "rollout") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WAITER, run.path]
    process = subprocess.Popen(
        command, env={**os.environ, VARIABLE: f"{stage}:0:{loop}"}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "started\n"
    return process


def test_nobody_waits_without_a_loop(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    stand_by(run, "no_such_module")
    assert main(["--run", str(run.path)]) == 0


def test_imports_first_then_waits_for_the_manifest(run: Run) -> None:
    process = waiter(run, os.getpid())
    time.sleep(0.5)
    assert process.poll() is None
    commit(run, "rollout")
    assert process.communicate(timeout=30)[0] == "True\n"
    assert process.returncode == 0


@pytest.mark.parametrize("stage", ["train", "rollout"])
def test_workers_of_other_stages_leave_the_port_to_training(run: Run, stage: str, monkeypatch) -> None:
    port = free_port()
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setenv("RANK", "0")
    process = waiter(run, os.getpid(), stage)
    time.sleep(1)
    with socket.socket() as other:
        other.bind(("", port))
    process.kill()
    process.wait()


def test_keeps_the_port_of_its_ranks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setenv("RANK", "0")
    process = waiter(run, os.getpid(), "reward")
    time.sleep(1)
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    commit(run, "reward")
    assert process.wait(30) == 0
    with socket.socket() as other:
        other.bind(("", port))


def test_another_stage_is_not_the_one_it_waits_for(run: Run) -> None:
    process = waiter(run, os.getpid())
    commit(run, "reward")
    time.sleep(0.5)
    assert process.poll() is None
    process.kill()
    process.wait()


def test_ends_with_a_loop_that_was_killed(run: Run) -> None:
    loop = subprocess.Popen(["sleep", "60"])
    process = waiter(run, loop.pid)
    loop.kill()
    loop.wait()
    assert process.communicate(timeout=30)[0] == ""
    assert process.returncode == EXIT_STOPPED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_ends_on_request(run: Run, number: signal.Signals) -> None:
    process = waiter(run, os.getpid())
    time.sleep(0.3)  # its handler is set after the line that it prints
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == EXIT_STOPPED


@pytest.mark.parametrize(
    ("stage", "begun"), [("rollout", "mark"), ("reward", "mark"), ("reward", "manifest"), ("train", "folder")]
)
def test_the_launcher_goes_on_when_the_stage_before_is_at_work(
    run: Run, monkeypatch: pytest.MonkeyPatch, stage: str, begun: str
) -> None:
    monkeypatch.setenv(VARIABLE, f"{stage}:0:{2**22 + 1}")  # no process has this number
    arguments = ["--run", str(run.path)]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == EXIT_STOPPED
    if begun == "manifest":
        commit(run, stage)
    else:
        folder = run.iteration_folder(0) / stage
        folder.mkdir(parents=True)
    if begun == "mark":
        (folder / "shard-00003.done.json").write_text("{}")
    assert main(arguments) == 0
