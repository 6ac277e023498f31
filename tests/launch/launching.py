"""Runs launchers of this checkout with the interpreter of the tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FORWARDED = ("PATH", "HOME", "LANG", "TMPDIR")


def environment(**extra: str) -> dict[str, str]:
    """A clean environment: nothing of the caller's decides what a launcher prints."""
    kept = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    return {**kept, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **extra}


def launch(name: str, *arguments: str, cwd: Path | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
    """`launch/NAME ARGUMENTS` to its end, output captured."""
    return subprocess.run(
        [str(ROOT / "launch" / name), *arguments],
        env=environment(**extra), cwd=cwd, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def dry_run(name: str, *arguments: str, **extra: str) -> list[str]:
    """The commands that a launcher would execute, with this machine's paths and port replaced by ROOT, BIN and PORT."""
    result = launch(name, *arguments, DRY_RUN="1", **extra)
    assert result.returncode == 0, result.stderr
    text = re.sub(r"--master_port \d+", "--master_port PORT", result.stdout)
    binaries = f"{Path(sys.executable).parent}/"
    text = text.replace(sys.executable, "BIN/python").replace(binaries, "BIN/")
    text = text.replace(str(ROOT), "ROOT")
    return re.sub(r"'((?:ROOT|BIN)[^' ]*)'", r"\1", text).splitlines()  # quoted where this checkout's path has a space
