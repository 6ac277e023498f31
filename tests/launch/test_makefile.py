"""The Makefile explains itself, and its targets call one launcher or module each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.launching import ROOT

TARGETS = [
    "help", "install", "test", "test-slow", "test-cluster", "lint", "format", "demo", "loop", "rollout", "reward",
    "train", "evaluate", "export", "status", "doctor", "plan", "report", "clean-run", "evidence", "drill", "bench",
    "bench-gpu", "tiny-janus",
    "tiny-bagel", "slurm-loop", "slurm-rollout", "slurm-reward", "slurm-train", "slurm-evaluate",
]  # fmt: skip
TEST = "OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile"
OURS = ("MODEL", "NODES", "GPUS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "RUN", "ARGS", "PYTHON")


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in OURS}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=cwd, env=kept, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what make reads, with a .venv that counts as installed; its path has a space."""
    copy = tmp_path / "a checkout"
    shutil.copytree(ROOT / "launch", copy / "launch")
    for name in ("Makefile", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, copy / name)
    (copy / ".venv").mkdir()
    (copy / ".venv" / ".installed").touch()
    return copy


def commands(checkout: Path, *arguments: str) -> list[str]:
    result = make("-n", *arguments, cwd=checkout)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_every_target_has_help() -> None:
    text = (ROOT / "Makefile").read_text()
    rules = re.findall(r"^([a-z][a-z-]*):(.*)$", text, re.MULTILINE)
    assert sorted(name for name, _ in rules) == sorted(TARGETS)
    assert all("  ## " in rest for _, rest in rules)
    phony = re.search(r"^\.PHONY:((?:.|\\\n)*?)\n\n", text, re.MULTILINE).group(1)
    assert sorted(phony.replace("\\\n", " ").split()) == sorted(TARGETS)


def test_make_alone_prints_the_help() -> None:
    result = make()
    assert result.returncode == 0
    assert result.stdout == make("help").stdout
    for target in TARGETS:
        assert re.search(rf"^  {target} +\w", result.stdout, re.MULTILINE), target


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["demo"], ['RUN="" launch/demo.sh']),
        (["loop", "RUN=my run", "RECIPE=gvu", 'ARGS=seed=1 "a=b c"'],
         ['launch/loop.sh --run "my run" --recipe "gvu" seed=1 "a=b c"']),
        (["rollout", "RUN=r", "ITERATION=0"], ['launch/rollout.sh --run "r" --iteration "0"']),
        (["reward", "RUN=r", "ITERATION=0"], ['launch/reward.sh --run "r" --iteration "0"']),
        (["train", "RUN=r", "ITERATION=3"], ['launch/train.sh --run "r" --iteration "3"']),
        (["evaluate", "RUN=r", "ITERATION=3"], ['launch/evaluate.sh --run "r" --iteration "3"']),
        (["slurm-loop", "RUN=my run", "RECIPE=gvu", "ARGS=--dry-run"],
         ['launch/slurm/submit.sh loop --run "my run" --recipe "gvu" --dry-run']),
        (["slurm-rollout", "RUN=r", "ITERATION=0"],
         ['launch/slurm/submit.sh rollout --run "r" --iteration "0"']),
        (["slurm-reward", "RUN=r", "ITERATION=0"], ['launch/slurm/submit.sh reward --run "r" --iteration "0"']),
        (["slurm-train", "RUN=r", "ITERATION=3"], ['launch/slurm/submit.sh train --run "r" --iteration "3"']),
        (["slurm-evaluate", "RUN=r", "ITERATION=3"], ['launch/slurm/submit.sh evaluate --run "r" --iteration "3"']),
        (["bench"], ["OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks"]),
        (["bench-gpu", "ARGS=--smoke"], [".venv/bin/python -m benchmarks --gpu --smoke"]),
        (["evidence", "SEEDS=5"], ['RUN="" launch/evidence.sh']),
        (["clean-run", "RUN=r"], ['RUN="r" launch/clean_run.sh']),
        (["status", "RUN=r"], ['.venv/bin/python -m unified_rl.ledger status "r"']),
        (["doctor", "RUN=r", "RECIPE=gvu", "ARGS=seed=1"],
         ['.venv/bin/python -m unified_rl.doctor --run "r" --recipe "gvu" seed=1']),
        (["plan", "MODEL=my model", "NODES=2", "GPUS=4"],
         ['.venv/bin/python -m unified_rl.plan --model "my model" --nodes "2" --gpus "4"']),
        (["report", "RUN=r"], ['.venv/bin/python -m unified_rl.report --run "r"']),
        (["export", "RUN=r", "ARGS=--out x"], ['.venv/bin/python -m unified_rl.train.export --run "r"  --out x']),
        (["drill", "FAULTS=9"],
         ['OMP_NUM_THREADS=1 .venv/bin/python -m tests.drill --faults 9 --seed 0 --out "runs/drill"']),
        (["test"], [TEST]),
        (["test", "ARGS=-x"], [f"{TEST} -x"]),
        (["test-slow"], ["OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m slow"]),
        (["install"], []),
    ],
)  # fmt: skip
def test_target_calls_its_launcher(checkout: Path, arguments: list[str], expected: list[str]) -> None:
    found = [line.strip() for line in commands(checkout, *arguments) if "Nothing to be done" not in line]
    assert found == expected


@pytest.mark.parametrize("changed", ["setup.py", "constraints.txt"])
def test_install_runs_again_only_when_requirements_change(checkout: Path, changed: str) -> None:
    assert commands(checkout, "test") == [f"{TEST} "]
    stamp = (checkout / ".venv" / ".installed").stat().st_mtime
    os.utime(checkout / changed, (stamp + 5, stamp + 5))
    assert commands(checkout, "test", "PYTHON=python3.12")[0] == 'PYTHON="python3.12" launch/install.sh'


def test_the_interpreter_that_builds_the_environment_does_not_reach_the_launchers(checkout: Path) -> None:
    (checkout / "launch" / "loop.sh").write_text('#!/bin/sh\necho "PYTHON=${PYTHON-unset}"\n')
    assert make("loop", "RUN=r", "PYTHON=python3.12", cwd=checkout).stdout == "PYTHON=unset\n"


@pytest.mark.parametrize("target", ["loop", "train", "status", "report"])
def test_a_missing_run_is_named(checkout: Path, target: str) -> None:
    result = make(target, cwd=checkout)
    assert result.returncode == 2
    assert "RUN is not set" in result.stderr


def test_clean_run_deletes_runs_and_nothing_else(checkout: Path) -> None:
    run, other = checkout / "runs" / "a run", checkout / "papers"
    for folder in (run / "iter_0000", other):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    (run / "config.yaml").write_text("seed: 1\nrollout:\n  group_size: 8\n")
    for arguments, message in (([], "RUN is not set"), (["RUN=papers"], "no config.yaml")):
        result = make("clean-run", *arguments, cwd=checkout)
        assert result.returncode == 2
        assert message in result.stderr
    (other / "config.yaml").write_text("site: mine\n")
    assert make("clean-run", "RUN=papers", cwd=checkout).returncode == 2
    assert (other / "file").exists()
    assert make("clean-run", "RUN=runs/a run", cwd=checkout).returncode == 0
    assert not run.exists()
    assert run.parent.exists()
