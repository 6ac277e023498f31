"""`python -m unified_rl.ledger status RUN`."""

import os
import socket
import subprocess
import sys

import pytest

from unified_rl.config import BackboneConfig, DataConfig, RolloutConfig, RunConfig, to_yaml
from unified_rl.ledger import Run
from unified_rl.manifests import Manifest, ShardInfo
from unified_rl.status import activity_line, status_text


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
