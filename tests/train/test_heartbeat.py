"""A rank that falls silent is named, within the time-out, also by operations of DeepSpeed's own groups."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.conftest import environment, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).parent / "lost_rank.py"


def test_a_silent_rank_is_named_within_the_timeout(tmp_path):
    shared = {**environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, str(SCRIPT), str(tmp_path / "said")]
    done = subprocess.run(command, env=shared, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    message, seconds = json.loads((tmp_path / "said").read_text())
    named = f"rank 1 on {socket.gethostname()} cannot be reached"
    assert named in message
    assert "the same command goes on" in message
    assert 14 < seconds < 15 + 10, "the time-out, and a few signs of life"
    assert f"no sign of life for 4 s: {named}" in done.stderr, "the log says so before the operation fails"


def test_ranks_that_do_not_meet_are_told_where(tmp_path):
    port = free_port()
    shared = {**environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    code = (
        "from unified_rl.runtime import current_ranks\n"
        "from unified_rl.train import zero3\n"
        "try:\n    zero3.init_process_group(current_ranks(), 'cpu', 1.0)\n"
        "except zero3.TrainError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**shared, "RANK": "0", "LOCAL_RANK": "0"}, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    assert f"rank 0 did not meet all 2 ranks at 127.0.0.1:{port} within 1 s" in done.stdout, done.stderr
