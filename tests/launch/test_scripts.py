"""Every shell script parses and is clean under shellcheck; the set-up script names what a machine lacks."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.launching import ROOT

BATCH = ROOT / "launch" / "slurm" / "stage.sbatch"  # a template: placeholders like @RUN@ are plain words to bash
SCRIPTS = [*sorted((ROOT / "launch").rglob("*.sh")), BATCH, ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.name in ("common.sh", BATCH.name) or os.access(script, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_are_clean_under_shellcheck() -> None:
    result = subprocess.run(
        ["shellcheck", "--external-sources", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


def fake_machine(tmp_path: Path, python: str) -> dict[str, str]:
    """A PATH with apt-get and a `python3` of the test's making, and a copy of the set-up script."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("apt-get", "exit 0"), ("python3", python)):
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    for name in ("bash", "dirname", "env", "rm", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "install.sh", tmp_path / "launch")
    return {"PATH": str(tools)}


def install(tmp_path: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(tmp_path / "launch" / "install.sh")], env=environment, capture_output=True, text=True, timeout=120
    )


def test_missing_venv_module_is_named_with_its_command(tmp_path: Path) -> None:
    python = "case $2 in *ensurepip*) exit 1 ;; *print*) echo 3.12 ;; esac"
    result = install(tmp_path, fake_machine(tmp_path, python))
    assert result.returncode == 1
    assert "apt-get install python3.12-venv" in result.stderr


def test_old_python_is_refused(tmp_path: Path) -> None:
    python = 'case $2 in *"(3, 10)"*) exit 1 ;; *print*) echo 3.9 ;; esac'
    result = install(tmp_path, fake_machine(tmp_path, python))
    assert result.returncode == 1
    assert "python3 is Python 3.9; 3.10 or newer is needed" in result.stderr


def test_missing_compiler_is_named_but_no_obstacle(tmp_path: Path) -> None:
    python = 'case "$*" in *print*) echo 3.12 ;; *venv*--clear*) echo "venv made"; exit 7 ;; esac'
    result = install(tmp_path, fake_machine(tmp_path, python))
    assert "apt-get install g++" in result.stdout
    assert "venv made" in result.stdout
    assert result.returncode == 7


def test_pinned_versions_cover_every_requirement() -> None:
    from importlib.metadata import requires, version

    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = [Requirement(line) for line in lines]
    active = {pin.name.lower(): pin for pin in pins if pin.marker is None or pin.marker.evaluate()}
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins)
    setup = (ROOT / "setup.py").read_text()
    for name in (
        "torch",
        "transformers",
        "deepspeed",
        "peft",
        "omegaconf",
        "webdataset",
        "pytest",
        "hypothesis",
        "ruff",
    ):
        assert name in active, name
        assert f'"{name}' in setup, name
        assert active[name].specifier.contains(version(name)), f"{name} {version(name)} is not the pinned one"
        for needed in map(Requirement, requires(name) or []):
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert needed.name.lower().replace("_", "-") in active, f"{needed.name}, needed by {name}, has no pin"
