"""Kill -9 of the whole process group at random moments of a loop; the same command again; the same bits at the end.

KILLS=20 pytest tests/test_kill_resume.py -m slow -s   runs the long drill.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OVERRIDES = [
    "iterations=2",
    "data.prompts_per_iteration=8",
    "rollout.group_size=4",
    "rollout.groups_per_shard=2",
    "rollout.groups_per_batch=2",
    "reward.batch_size=8",
    "train.groups_per_step=4",
    "train.micro_batch=8",
    "evaluate.prompts=''",
]
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
MEASURED = ("time/", "throughput/", "memory/")


def loop_command(run: Path, prompts: Path) -> list[str]:
    recipe = ["--run", str(run), "--recipe", "gvu_janus_shapes"]
    return ["bash", str(ROOT / "launch/loop.sh"), *recipe, f"data.prompts={prompts}", *OVERRIDES]


def run_loop(run: Path, prompts: Path, kill_after: float | None = None) -> tuple[int, float]:
    """(exit code, seconds); with `kill_after` the group dies by SIGKILL after so many seconds."""
    start = time.monotonic()
    streams = {"stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "env": ENVIRONMENT}
    with (
        open(run.parent / f"{run.name}.log", "ab") as log,
        subprocess.Popen(loop_command(run, prompts), stdout=log, start_new_session=True, **streams) as process,
    ):
        try:
            code = process.wait(kill_after or 600)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    return code, time.monotonic() - start


def fingerprint(run: Path) -> dict[str, str]:
    """SHA-256 of every file that a run leaves in its iterations; measured times are taken out of the metrics."""
    prints = {}
    for path in sorted(run.glob("iter_*/**/*")):
        if not path.is_file():
            continue
        data = path.read_bytes()
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in data.splitlines()]
            kept = [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in lines]
            data = json.dumps(kept, sort_keys=True).encode()
        prints[str(path.relative_to(run))] = hashlib.sha256(data).hexdigest()
    return prints


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_and_restarted_loop_ends_with_the_same_bits(tmp_path):
    prompts = tmp_path / "prompts"
    pack = [sys.executable, str(ROOT / "data_tools/pack_prompts.py"), "--shapes", "train", "--out", str(prompts)]
    subprocess.run(pack, check=True, env=ENVIRONMENT)
    whole = tmp_path / "whole"
    code, duration = run_loop(whole, prompts)
    assert code == 0, (tmp_path / "whole.log").read_text()[-3000:]
    rng = random.Random(int(os.environ.get("KILL_SEED", "0")))
    killed = tmp_path / "killed-0"
    kills, finished = 0, 0
    while kills < int(os.environ.get("KILLS", "3")):
        code, seconds = run_loop(killed, prompts, kill_after=rng.uniform(0.05, 0.6) * duration)
        assert code in (0, -signal.SIGKILL), (tmp_path / f"{killed.name}.log").read_text()[-3000:]
        if code == 0:  # finished before the kill: start another run, so that every kill counts
            assert fingerprint(killed) == fingerprint(whole)
            finished += 1
            killed = tmp_path / f"killed-{finished}"
        else:
            kills += 1
            print(f"kill {kills} after {seconds:.1f} s of {duration:.1f} s", flush=True)
    code, _ = run_loop(killed, prompts)
    assert code == 0, (tmp_path / f"{killed.name}.log").read_text()[-3000:]
    assert fingerprint(killed) == fingerprint(whole)
    assert len(list(whole.glob("iter_*/policy/*.safetensors"))) == 2
