"""A rank that falls silent is named, within the time-out, also by operations of DeepSpeed's own groups."""

import json
import socket
import subprocess
import sys
from pathlib import Path

from tests.train.conftest import environment, free_port

SCRIPT = Path(__file__).parent / "lost_rank.py"


def test_a_silent_rank_is_named_within_the_timeout(tmp_path):
    shared = {**environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path / "said")],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        _, log = ranks[0].communicate(timeout=120)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    message, seconds = json.loads((tmp_path / "said").read_text())
    named = f"rank 1 on {socket.gethostname()} cannot be reached"
    assert named in message
    assert "the same command goes on" in message
    assert seconds < 10 + 5
    assert f"no sign of life for 3 s: {named}" in log, "the log says so before the operation fails"
