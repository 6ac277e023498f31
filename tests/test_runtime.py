"""Ranks, seeds, signals, progress lines, command line and exit codes."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest

from unified_rl import runtime
from unified_rl.config import ConfigError
from unified_rl.runtime import (
    EXIT_STOPPED,
    Progress,
    Ranks,
    StageError,
    StopRequest,
    current_ranks,
    format_seconds,
    log,
    run_stage,
    sample_seed,
    stage_arguments,
)

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_ID")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in (*VARIABLES, "UNIFIED_RL_TRACEBACK", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(runtime, "_stage", "test")


def set_all(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_ranks_alone():
    assert current_ranks() == Ranks(0, 0, 1)


def test_ranks_of_a_launcher_win_over_slurm(monkeypatch):
    set_all(monkeypatch, RANK="5", LOCAL_RANK="1", WORLD_SIZE="8")
    set_all(monkeypatch, SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="2")
    assert current_ranks() == Ranks(5, 1, 8)


def test_ranks_of_slurm(monkeypatch):
    set_all(monkeypatch, SLURM_PROCID="3", SLURM_LOCALID="1", SLURM_NTASKS="4", SLURM_STEP_ID="0")
    assert current_ranks() == Ranks(3, 1, 4)


@pytest.mark.parametrize("step", [None, "4294967291", "4294967290"])
def test_a_batch_script_is_no_task_of_srun(monkeypatch, step):
    set_all(monkeypatch, SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="8")
    if step is not None:
        monkeypatch.setenv("SLURM_STEP_ID", step)
    assert current_ranks() == Ranks(0, 0, 1)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "RANK='x'"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE"),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK=2"),
        ({"RANK": "0", "LOCAL_RANK": "-1", "WORLD_SIZE": "2"}, "LOCAL_RANK=-1"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"SLURM_PROCID": "0", "SLURM_LOCALID": "", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, "SLURM_LOCALID=''"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "x"}, "SLURM_STEP_ID='x'"),
    ],
)
def test_bad_ranks_name_the_variable(monkeypatch, values, named):
    set_all(monkeypatch, **values)
    with pytest.raises(StageError, match=named):
        current_ranks()


def test_sample_seed_is_pinned():
    # First 8 bytes of sha256("1234|3|p-1|7"), shifted right by one. Stored runs depend on it.
    assert sample_seed(1234, 3, "p-1", 7) == 3263968438339544994


def test_sample_seeds_differ_in_every_argument():
    base = (1, 2, "a", 3)
    others = [(9, 2, "a", 3), (1, 9, "a", 3), (1, 2, "b", 3), (1, 2, "a", 9), (1, 23, "a", 3), (12, 2, "a", 3)]
    seeds = {sample_seed(*arguments) for arguments in [base, *others]}
    assert len(seeds) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_first_signal_requests_second_acts():
    program = (
        "import os, signal, time\n"
        "from unified_rl.runtime import StopRequest\n"
        "with StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.{name})\n"
        "    print('requested', stop.requested, flush=True)\n"
        "    os.kill(os.getpid(), signal.{name})\n"
        "    time.sleep({seconds})\n"
        "    print('survived', flush=True)\n"
    )
    # USR2 is a scheduler's warning: a second one changes nothing.
    warned = subprocess.run(
        [sys.executable, "-c", program.format(name="SIGUSR2", seconds=0)], capture_output=True, text=True, timeout=280
    )
    assert (warned.stdout, warned.returncode) == ("requested True\nsurvived\n", 0)
    for name in ("SIGTERM", "SIGINT"):
        done = subprocess.run(
            [sys.executable, "-c", program.format(name=name, seconds=5)], capture_output=True, text=True, timeout=280
        )
        assert done.stdout == "requested True\n"
        assert done.returncode == -getattr(signal, name)
        assert f"{name} received" in done.stderr


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    with StopRequest() as stop:
        assert not stop.requested
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before


def test_forked_child_dies_of_term():
    with StopRequest() as stop:
        child = os.fork()
        if child == 0:
            time.sleep(20)
            os._exit(0)
        time.sleep(0.05)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert not stop.requested


def test_plain_lines_at_most_every_ten_seconds(capsys):
    now = [0.0]
    bar = Progress(100, "images", clock=lambda: now[0])
    for _ in range(24):
        now[0] += 1.0
        bar.update(4, reward=0.25)
    now[0] += 1.0
    bar.update(4, reward=0.5)
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "[test r0] images 40/100, 4/s, eta 0:15, reward=0.25",
        "[test r0] images 80/100, 4/s, eta 0:05, reward=0.25",
        "[test r0] images 100/100, 4/s, took 0:25, reward=0.5",
    ]


def test_interrupted_progress_prints_its_last_count(capsys):
    now = [0.0]
    with Progress(10, "images", clock=lambda: now[0]) as bar:
        assert bar.eta_s is None
        now[0] = 2.0
        bar.update(4)
        assert bar.eta_s == pytest.approx(3.0)
    assert capsys.readouterr().err == "[test r0] images 4/10, 2/s, eta 0:03\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("no_color", [False, True])
def test_bar_on_a_terminal(monkeypatch, no_color):
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    else:
        monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with runtime.Progress(4, "images") as bar:
        bar.update(2, reward=0.123456)
        log("a line in between")
        bar.update(2, reward=0.5)
    text = terminal.getvalue()
    assert "4/4" in text and "reward=0.5" in text
    assert "[test r0] a line in between\n" in text
    assert ("\x1b[32m" in text) == (not no_color)


def test_tqdm_disable_gives_plain_lines(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with runtime.Progress(1, "images") as bar:
        bar.update(1)
    assert terminal.getvalue().startswith("[test r0] images 1/1, ")
    assert "\r" not in terminal.getvalue()


def test_log_names_the_rank(monkeypatch, capsys):
    set_all(monkeypatch, RANK="3", LOCAL_RANK="0", WORLD_SIZE="4")
    log("hello")
    assert capsys.readouterr().err == "[test r3] hello\n"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3725, "1:02:05")])
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text


def test_stage_arguments_mixed_order():
    arguments = stage_arguments(
        "rollout", "x", ["seed=3", "--run", "runs/a", "--iteration", "2", "--local_rank=1", "train.ranks=2"]
    )
    assert (arguments.run, arguments.iteration, arguments.recipe) == ("runs/a", 2, None)
    assert arguments.overrides == ["seed=3", "train.ranks=2"]


def test_stage_arguments_help_shows_the_example(capsys):
    with pytest.raises(SystemExit) as exit_:
        stage_arguments("reward", "python -m unified_rl.reward --run runs/demo --iteration 0", ["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "python -m unified_rl.reward --run runs/demo --iteration 0" in text
    assert "local_rank" not in text


@pytest.mark.parametrize(
    "argv", [["--iteration", "1"], ["--run", "r"], ["--run", "r", "--iteration", "-1"], ["--run", "r", "--bogus"]]
)
def test_bad_arguments_are_usage_errors(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        stage_arguments("rollout", "x", argv)
    assert exit_.value.code == 2
    assert "usage:" in capsys.readouterr().err


def raiser(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code"),
    [(StageError("broken"), 1), (ConfigError("broken"), 2), (OSError(28, "broken", "file"), 1)],
)
def test_expected_errors_have_no_traceback(capsys, error, code):
    with pytest.raises(SystemExit) as exit_:
        run_stage(raiser(error))
    assert exit_.value.code == code
    text = capsys.readouterr().err
    assert text.startswith("error: ") and "broken" in text and "Traceback" not in text


def test_traceback_on_request(monkeypatch, capsys):
    monkeypatch.setenv("UNIFIED_RL_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        run_stage(raiser(StageError("broken")))
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("bug"), KeyError("bug"), FileNotFoundError(2, "bug")])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run_stage(raiser(error))


def test_exit_code_is_passed_on():
    with pytest.raises(SystemExit) as exit_:
        run_stage(lambda: EXIT_STOPPED)
    assert exit_.value.code == 75


def test_threads_and_determinism():
    program = (
        "import os\n"
        "from unified_rl.runtime import enable_determinism, set_cpu_threads\n"
        "set_cpu_threads(1); enable_determinism()\n"
        "import torch\n"
        "print(torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), os.environ['OMP_NUM_THREADS'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=280, check=True)
    assert done.stdout.split() == ["1", "True", "1"]


def test_zero_threads_are_refused():
    with pytest.raises(StageError, match="at least 1"):
        runtime.set_cpu_threads(0)


def test_an_ignored_interrupt_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
