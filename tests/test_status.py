"""`python -m unified_rl.ledger status RUN`."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from unified_rl.config import BackboneConfig, DataConfig, RolloutConfig, RunConfig, to_yaml
from unified_rl.ledger import Run
from unified_rl.manifests import Manifest, ShardInfo
from unified_rl.status import activity_line, is_locked, status_text


@pytest.fixture
def run(tmp_path) -> Run:
    config = RunConfig(
        iterations=4, backbone=BackboneConfig(path="assets:none"), rollout=RolloutConfig(groups_per_shard=30),
        data=DataConfig(prompts="none", prompts_per_iteration=64),
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    return Run(tmp_path, config)


def fill(run: Run) -> None:
    infos = [ShardInfo(f"shard-{i:05d}.tar", 2, "ab" * 32, 10) for i in range(3)]
    run.commit(Manifest("rollout", 0, infos, "base", run.config_hash, {"groups": 64, "images": 512}))
    run.commit(Manifest("reward", 0, infos, "base", run.config_hash, {"failed": 2}, [], {"reward_mean": 0.43125}))
    extra = {"policy_sha256": "cd" * 32, "checkpoint": "checkpoints/iter_0000"}
    run.commit(Manifest("train", 0, [], "base", run.config_hash, {"steps": 8}, [], extra))
    run.policy_folder(0).mkdir()
    run.mark_shard(1, "rollout", 2, ShardInfo("shard-00002.tar", 2, "ab" * 32, 10), {})


def test_table(run):
    fill(run)
    lines = status_text(run.path).splitlines()
    assert lines[0] == f"run {run.path}: not started, or no status yet"
    assert [line.split() for line in lines[1:4]] == [
        ["iteration", "rollout", "reward", "train", "images", "failed", "reward", "policy"],
        ["0", "3/3", "3/3", "done", "512", "2", "0.4313", "base"],
        ["1", "1/3", "-", "-"],
    ]
    assert lines[4] == "1 of 4 iterations done; last checkpoint: checkpoints/iter_0000"


def test_activity(run):
    run.write_status(stage="rollout", iteration=1, done=64, total=512, eta_s=61.0, reward=0.4)
    line = activity_line(run.read_status())
    assert line.startswith("running, rollout of iteration 1 (of 4), 64/512, eta 1:01, reward 0.4000, 0:0")
    assert line.endswith(f"ago by process {os.getpid()} on {socket.gethostname()}")


def test_a_dead_process_is_called_dead():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    status = {"state": "running", "host": socket.gethostname(), "pid": child, "eta_s": 5}
    assert activity_line(status).startswith("interrupted (its process is gone")
    assert "eta" not in activity_line(status)
    assert activity_line({**status, "host": "elsewhere"}).startswith("running")
    assert activity_line({**status, "state": "finished"}).startswith("finished")


def status_command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "unified_rl.ledger", "status", *arguments], capture_output=True, text=True, timeout=280
    )


def test_command(run):
    fill(run)
    done = status_command(str(run.path))
    assert done.returncode == 0
    assert done.stdout == status_text(run.path) + "\n"


def test_command_without_a_run(tmp_path):
    done = status_command(str(tmp_path / "none"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "config.yaml does not exist" in done.stderr


def test_command_names_a_damaged_manifest(run):
    fill(run)
    path = run.path / "iter_0000/reward/manifest.json"
    path.write_bytes(path.read_bytes().replace(b"0.43125", b"0.93125"))
    done = status_command(str(run.path))
    assert done.returncode == 1
    assert "reward/manifest.json has a wrong checksum" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_has_an_example():
    assert "python -m unified_rl.ledger status runs/demo" in status_command("--help").stdout


def test_nothing_heavy_is_imported(run):
    fill(run)
    program = (
        "import sys\n"
        "from unified_rl.status import status_command\n"
        "import unified_rl.shards, unified_rl.records\n"
        f"status_command(['status', {str(run.path)!r}])\n"
        "heavy = {'torch', 'numpy', 'PIL', 'webdataset', 'transformers', 'deepspeed', 'safetensors'}\n"
        "sys.exit(repr(sorted(heavy & set(sys.modules))) if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def test_progress_of_the_last_iteration(run):
    """Two of three shards of two images, two seconds apart: one image a second, and one shard is left."""
    fill(run)
    run.mark_shard(1, "rollout", 0, ShardInfo("shard-00000.tar", 2, "ab" * 32, 10), {"failed": 1})
    for index, when in ((0, 1000), (2, 1002)):
        os.utime(run.iteration_folder(1) / f"rollout/shard-{index:05d}.done.json", (when, when))
    rows = [line.split() for line in status_text(run.path).splitlines()]
    assert ["stage", "shards", "images", "failed", "images/s", "eta"] in rows
    assert ["rollout", "2/3", "4", "1", "1", "0:02"] in rows


def test_progress_of_training(run):
    fill(run)
    run.stage_folder(1, "train")
    run.write_status(stage="train", iteration=1, done=3, total=8, eta_s=61.0)
    assert ["train", "3/8", "steps", "1:01"] in [line.split() for line in status_text(run.path).splitlines()]


def blocked(run: Run) -> list[str]:
    return [line for line in status_text(run.path).splitlines() if line.startswith("blocked: ")]


def test_a_failed_stage_is_named_until_it_is_committed(run):
    with pytest.raises(ValueError, match="red"), run.lock("reward-1"):
        raise ValueError("the judge sees red\nin all images")
    expected = f"blocked: reward-1: process {os.getpid()} on {socket.gethostname()} failed: "
    assert blocked(run) == [expected + "ValueError: the judge sees red in all images"]
    os.utime(run.path / ".locks/reward-1.lock", (1000, 1000))
    fill(run)
    assert not any("reward-1" in line for line in blocked(run))


def test_a_failed_evaluation_is_named_until_one_is_committed(run):
    with pytest.raises(ValueError, match="red"), run.lock("evaluation-1"):
        raise ValueError("the judge sees red")
    assert len(blocked(run)) == 1
    os.utime(run.path / ".locks/evaluation-1.lock", (1000, 1000))
    manifest = run.path / "evaluation/iter_0000/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    assert not any("evaluation-1" in line for line in blocked(run))


def test_a_stage_that_ends_well_leaves_nothing(run):
    with run.lock("reward-0"):
        pass
    assert (run.path / ".locks/reward-0.lock").read_text() == ""
    assert blocked(run) == [f"blocked: nothing runs: `make loop RUN={run.path}` continues"]


@pytest.fixture
def holder(run):
    """Process id of a child that holds the lock rollout-0."""
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        with run.lock("rollout-0"):
            os.write(go, b"x")
            signal.pause()
    os.read(ready, 1)
    yield child
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_killed_worker(run, holder):
    assert is_locked(run.path / ".locks/rollout-0.lock")
    assert blocked(run) == []
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert not is_locked(run.path / ".locks/rollout-0.lock")
    assert f"rollout-0: process {holder} on {socket.gethostname()} was killed" in blocked(run)[0]


def test_a_lock_of_the_dead(run, holder):
    """A file server may keep the lock of a process that is gone; here a living one stands in for the server."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    path = run.path / ".locks/rollout-0.lock"
    path.write_text(f"host {socket.gethostname()}, process {child}\n")
    assert blocked(run) == [
        f"blocked: rollout-0: process {child} on {socket.gethostname()} is gone, but its lock is held: delete {path}"
    ]
    path.write_text("host elsewhere, process 5\n")
    assert "process 5 on elsewhere holds its lock and has said nothing for over 10 minutes" in blocked(run)[0]
    run.write_status(stage="rollout")
    assert blocked(run) == []


def test_a_missing_stage(run):
    fill(run)
    (run.path / "iter_0000/reward/manifest.json").unlink()
    assert "reward of iteration 0 is missing, although train of iteration 0 is committed" in blocked(run)[0]


def test_fast_with_100000_records(run):
    fill(run)
    for index in range(391):
        run.mark_shard(1, "rollout", index, ShardInfo(f"shard-{index:05d}.tar", 256, "ab" * 32, 10), {})
    for iteration in range(2, 60):
        run.iteration_folder(iteration).mkdir()
    start = time.process_time()
    text = status_text(run.path)
    assert time.process_time() - start < 3
    assert "the last 20 of 60 iterations:" in text
