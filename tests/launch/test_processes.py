"""Processes that launchers start: failures and signals reach all of them, nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.launching import ROOT, environment

SETUP = f"source '{ROOT}/launch/common.sh'; find_python; "
# Notes its pid and rank, then waits; TERM and how long it then takes are the test's choice.
WORKER = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit({on_term}))
pathlib.Path({folder!r}, os.environ.get("RANK", "none")).write_text(str(os.getpid()))
time.sleep({seconds})
"""


def start(script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", "-c", SETUP + script], env=environment(), start_new_session=True, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def wait_for_pids(folder: Path, count: int, seconds: float = 60) -> list[int]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        texts = [path.read_text() for path in folder.iterdir()]
        if len(texts) == count and all(texts):
            return [int(text) for text in texts]
        time.sleep(0.02)
    raise AssertionError(f"{count} workers did not start: {sorted(folder.iterdir())}")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def all_gone(pids: list[int], seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "pids of workers"
    path.mkdir()
    yield path
    for file in path.iterdir():
        pid = int(file.read_text())
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def worker_file(folder: Path, on_term: int = 75, seconds: float = 60) -> Path:
    path = folder.parent / "worker.py"
    path.write_text(WORKER.format(folder=str(folder), on_term=on_term, seconds=seconds))
    return path


def test_workers_know_their_rank(tmp_path: Path) -> None:
    shell = start("run_workers 3 bash -c 'echo $RANK/$LOCAL_RANK/$WORLD_SIZE'")
    output = shell.communicate(timeout=120)[0]
    assert shell.returncode == 0
    assert sorted(output.split()) == ["0/0/3", "1/1/3", "2/2/3"]


def test_arguments_arrive_as_given(tmp_path: Path) -> None:
    shell = start("""run "$PYTHON" -c 'import sys; print(sys.argv[1:])' 'a  b' '*' '' 'x="y"'""")
    assert shell.communicate(timeout=120)[0].strip() == str(["a  b", "*", "", 'x="y"'])


def test_a_failed_worker_stops_the_others_and_its_code_is_returned(folder: Path) -> None:
    worker = worker_file(folder)
    fail = f"while [[ ! -s '{folder}/0' || ! -s '{folder}/2' ]]; do sleep 0.05; done; exit 41"
    choose = f'if [[ $RANK == 1 ]]; then {fail}; else exec "$PYTHON" "{worker}"; fi'
    (folder.parent / "choose.sh").write_text(choose)
    shell = start(f"export PYTHON; run_workers 3 bash '{folder.parent}/choose.sh'")
    pids = wait_for_pids(folder, 2)
    output = shell.communicate(timeout=120)[0]
    assert shell.returncode == 41, output
    assert all_gone(pids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_to_the_launcher_reaches_all_workers(folder: Path, number: signal.Signals) -> None:
    shell = start(f"run_workers 2 \"$PYTHON\" '{worker_file(folder)}'")
    pids = wait_for_pids(folder, 2)
    shell.send_signal(number)
    output = shell.communicate(timeout=120)[0]
    assert shell.returncode == 75, output
    assert all_gone(pids)


def test_workers_that_finish_on_a_signal_are_a_success_but_nothing_more_starts(folder: Path) -> None:
    worker = worker_file(folder, on_term=0)
    shell = start(f"stage_done() {{ run_workers 2 \"$PYTHON\" '{worker}'; }}; stage_done; run echo next")
    wait_for_pids(folder, 2)
    shell.terminate()
    output = shell.communicate(timeout=120)[0]
    assert "next" not in output
    assert shell.returncode == 0


def test_a_signal_passes_through_nested_launchers(folder: Path) -> None:
    inner = folder.parent / "inner.sh"
    inner.write_text(SETUP + f"run_workers 2 \"$PYTHON\" '{worker_file(folder)}'")
    shell = start(f"run bash '{inner}'; echo after")
    pids = wait_for_pids(folder, 2)
    shell.terminate()
    output = shell.communicate(timeout=120)[0]
    assert shell.returncode == 75, output
    assert "after" not in output
    assert all_gone(pids)


@pytest.mark.parametrize("fails", [False, True])
def test_launchers_side_by_side_end_together(folder: Path, fails: bool) -> None:
    launchers = folder.parent / "launch"
    launchers.mkdir()
    waits = f"run_workers 1 \"$PYTHON\" '{worker_file(folder)}'"
    ends = f"while [[ ! -s '{folder}/0' ]]; do sleep 0.05; done; exit 41"
    other = ends if fails else waits.replace("run_workers 1", "run")  # without a rank: a file of its own
    for name, script in (("one", waits), ("two", other)):
        (launchers / f"{name}.sh").write_text(f"#!/bin/bash\n{SETUP}{script}")
        (launchers / f"{name}.sh").chmod(0o755)
    shell = start(f"ROOT='{folder.parent}'; begin '' one; begin '' two; finish 0; echo after")
    pids = wait_for_pids(folder, 1 if fails else 2)
    if not fails:
        shell.terminate()
    output = shell.communicate(timeout=120)[0]
    assert shell.returncode == (41 if fails else 75), output
    assert "after" not in output
    assert all_gone(pids)


@pytest.mark.parametrize("code", [0, 41])
def test_a_launcher_that_stands_by_outlives_the_one_before_unless_that_fails(folder: Path, code: int) -> None:
    launchers = folder.parent / "launch"
    launchers.mkdir()
    scripts = {
        "first": f"while [[ ! -s '{folder}/0' ]]; do sleep 0.05; done; echo \"first ${{STANDBY-}}\"; exit {code}",
        "second": f'echo "second ${{STANDBY%:*}}"; {SETUP}run_workers 1 "$PYTHON" \'{worker_file(folder)}\'',
    }
    for name, script in scripts.items():
        (launchers / f"{name}.sh").write_text(f"#!/bin/bash\n{script}")
        (launchers / f"{name}.sh").chmod(0o755)
    shell = start(
        f"ROOT='{folder.parent}'; begin '' first; finish 1; begin first:0 second; finish 1; "
        'echo "left ${#STARTED[@]}"; finish 0; echo after'
    )
    pids = wait_for_pids(folder, 1)
    if code == 0:
        time.sleep(1)
        assert not all_gone(pids, 0.1)
        shell.terminate()
    output = shell.communicate(timeout=120)[0]
    assert shell.returncode == (code or 75), output
    assert "first \n" in output and "second first:0\n" in output
    assert ("left 1" in output) == (code == 0) and "after" not in output
    assert all_gone(pids)


def test_workers_that_ignore_the_signal_are_killed(folder: Path) -> None:
    worker = worker_file(folder)
    worker.write_text(worker.read_text().replace("lambda *_: sys.exit(75)", "signal.SIG_IGN"))
    shell = start(f"STOP_SECONDS=1; run_workers 2 \"$PYTHON\" '{worker}'")
    pids = wait_for_pids(folder, 2)
    shell.terminate()
    shell.communicate(timeout=120)
    assert shell.returncode == 75
    assert all_gone(pids)


def test_kill_9_of_the_process_group_leaves_nothing(folder: Path) -> None:
    inner = folder.parent / "inner.sh"
    inner.write_text(SETUP + f"run_workers 2 \"$PYTHON\" '{worker_file(folder)}'")
    shell = start(f"run bash '{inner}'")
    pids = wait_for_pids(folder, 2)
    os.killpg(shell.pid, signal.SIGKILL)
    shell.communicate(timeout=120)
    assert all_gone(pids)


def test_a_signal_skips_a_parent_that_would_abandon_its_children(folder: Path) -> None:
    """As `deepspeed` does: it dies on TERM and leaves its child running."""
    parent = folder.parent / "parent.py"
    parent.write_text(
        "import subprocess, sys\n"
        f"code = subprocess.call([sys.executable, {str(worker_file(folder, on_term=9))!r}])\n"
        "sys.exit(code)\n"
    )
    shell = start(f'SIGNAL_BELOW=1; run "$PYTHON" \'{parent}\' || echo "code $?"')
    pids = wait_for_pids(folder, 1)
    shell.terminate()
    output = shell.communicate(timeout=120)[0]
    assert output.strip() == "code 75"
    assert all_gone(pids)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_deepspeed_launcher_stops_its_ranks(folder: Path) -> None:
    (folder.parent / "waiting_module.py").write_text(worker_file(folder).read_text())
    shell = start(
        f"export DS_ACCELERATOR=cpu PYTHONPATH='{ROOT}:{folder.parent}'; LAUNCH_ENV=(); SIGNAL_BELOW=1; "
        'port=$("$PYTHON" -m unified_rl.launching port); '
        'run "$PYTHON" -m deepspeed.launcher.runner --num_gpus 2 --master_port "$port" --no_local_rank --quiet '
        "--module waiting_module"
    )
    pids = wait_for_pids(folder, 2, seconds=240)
    shell.terminate()
    output = shell.communicate(timeout=240)[0]
    assert shell.returncode == 75, output
    assert all_gone(pids)


@pytest.mark.parametrize(
    ("setting", "committed", "code"),
    [("", True, 0), ("", False, 1), ("STOPPED=TERM; ", False, 75), ("DRY_RUN=1; ", False, 0)],
)
def test_a_stage_that_ends_uncommitted_fails(tmp_path, setting, committed, code):
    mark = tmp_path / "a $(run)/iter_0008/rollout/manifest.json"
    if committed:
        mark.parent.mkdir(parents=True)
        mark.write_text("{}")
    shell = start(f"RUN='{tmp_path}/a $(run)'; ITERATION=08; {setting}require_committed rollout")
    assert shell.wait(60) == code
    expected = "" if not code else f"error: rollout ended without {mark}; the same command continues it\n"
    assert shell.stdout.read() == expected


def test_an_evaluation_that_ends_uncommitted_fails(tmp_path):
    shell = start(f"RUN='{tmp_path}'; ITERATION=08; require_committed evaluation")
    assert shell.wait(60) == 1
    mark = tmp_path / "evaluation/iter_0008/manifest.json"
    assert shell.stdout.read() == f"error: evaluation ended without {mark}; the same command continues it\n"
