"""The real stages of a small run under SLURM: workers as tasks of arrays, two ranks of training on two nodes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import Cluster

ROOT = Path(__file__).parents[2]
OVERRIDES = [
    "iterations=1", "data.prompts_per_iteration=4", "rollout.group_size=2", "rollout.groups_per_shard=2",
    "rollout.groups_per_batch=2", "reward.batch_size=8", "train.groups_per_step=4", "train.micro_batch=4",
    "rollout.workers=2", "reward.workers=2", "train.ranks=1", "evaluate.prompts=''",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("launcher", ["srun", "deepspeed", "torchrun"])
def test_one_iteration_ends_with_a_report(launcher: str, cluster: Cluster, tmp_path: Path) -> None:
    environment = {**cluster.environment, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    prompts, run, site = tmp_path / "prompts", tmp_path / "a run", tmp_path / "site.env"
    pack = [sys.executable, str(ROOT / "data_tools/pack_prompts.py"), "--shapes", "train", "--out", str(prompts)]
    subprocess.run(pack, check=True, env=environment, capture_output=True)
    # The nodes n1 and n2 are names of SLURM only.
    setup = "SETUP='export MASTER_ADDR=127.0.0.1 PYTHONUNBUFFERED=1'"
    site.write_text(f"GPU_OPTION=\nTRAIN_NODES=2\nTRAIN_LAUNCHER={launcher}\n{setup}\n")
    result = subprocess.run(
        [str(ROOT / "launch" / "slurm" / "submit.sh"), "loop", "--run", str(run), "--recipe", "gvu_janus_shapes",
         f"data.prompts={prompts}", *OVERRIDES],
        env={**environment, "SLURM_SITE": str(site)}, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines():
        job, name = line.split()
        fields = cluster.wait_state(job, ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), 600)
        logs = "\n".join(path.read_text()[-3000:] for path in sorted((run / "slurm" / "logs").glob("*.out")))
        assert fields["JobState"] == "COMPLETED", f"{name}: {fields}\n{logs}"
    assert (run / "iter_0000" / "train" / "manifest.json").is_file()
    assert (run / "report.html").is_file()
