"""Under a real SLURM: ranks inside tasks, order and failure of a chain, the stop before the time limit, requeues."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import DONE, Cluster
from tests.cluster.waiting import wait_for

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
# Stands in for the interpreter: records how it was called, then does what the test's file `behaviour` says.
STAGE = """#!/bin/bash
echo "$2 RANK=$RANK LOCAL_RANK=$LOCAL_RANK WORLD_SIZE=$WORLD_SIZE MASTER=${MASTER_ADDR:-}:${MASTER_PORT:-} \\
STEP=$SLURM_STEP_ID RESTART=${SLURM_RESTART_COUNT:-0} ITERATION=$6 RUN=$4" >>'FOLDER/calls'
source 'FOLDER/behaviour'
"""
# The train stage leaves its commit mark, as the real one does.
MARK = 'mark=$4/iter_0000/train; [[ $2 != unified_rl.train ]] || { mkdir -p "$mark"; touch "$mark/manifest.json"; }'


class Submission:
    """A run whose stages are shell scripts of the test's making."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.run = folder / "a run's $(touch x)"
        self.python = folder / "python"
        self.python.write_text(STAGE.replace("FOLDER", str(folder)))
        self.python.chmod(0o755)
        self.behave(":")
        self.site = {"PYTHON": str(self.python), "GPU_OPTION": "", "CPUS_PER_TASK": "1", "TIME": "00:05:00"}

    def behave(self, script: str) -> None:
        (self.folder / "behaviour").write_text(f"{script}\n")

    def submit(self, *arguments: str, **site: str) -> dict[str, str]:
        """Job ids by name."""
        settings = self.folder / "site.env"
        settings.write_text("".join(f"{key}='{value}'\n" for key, value in {**self.site, **site}.items()))
        environment = {**self.cluster.environment, "PYTHON": sys.executable, "SLURM_SITE": str(settings)}
        result = subprocess.run(
            [str(ROOT / "launch" / "slurm" / "submit.sh"), arguments[0], "--run", str(self.run), *arguments[1:],
             "--recipe", "gvu_janus_shapes", "rollout.workers=2", "reward.workers=2", "train.ranks=2", "iterations=1"],
            env=environment, cwd=self.folder, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return {name: job for job, name in (line.split() for line in result.stdout.splitlines())}

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def calls_of(self, stage: str) -> list[str]:
        return [line for line in self.calls() if line.startswith(f"unified_rl.{stage} ")]

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self.run / "slurm" / "logs").glob("*.out")))


@pytest.fixture
def submission(cluster: Cluster, tmp_path: Path) -> Submission:
    return Submission(cluster, tmp_path)


def test_the_loop_runs_in_order_with_the_ranks_of_each_stage(submission: Submission) -> None:
    submission.behave(MARK)
    ids = submission.submit("loop", TRAIN_NODES="2")
    for name, job in ids.items():
        fields = submission.cluster.wait_state(job, DONE)
        assert fields["JobState"] == "COMPLETED", (name, fields, submission.log())
    calls = submission.calls()
    modules = [line.split()[0].removeprefix("unified_rl.") for line in calls]
    order = [module for module in modules if module != "evaluation"]
    assert order == ["rollout"] * 2 + ["reward"] * 2 + ["train"] * 4 + ["report"]
    assert all(line.endswith(f"RUN={submission.run}") for line in calls)
    assert {line.split()[1] for line in calls if "rollout" in line.split()[0]} == {"RANK=0", "RANK=1"}
    train = sorted(line.split()[1:5] for line in calls if ".train " in line)
    assert [words[:3] for words in train] == [
        [f"RANK={rank}", f"LOCAL_RANK={rank % 2}", "WORLD_SIZE=4"] for rank in range(4)
    ]
    assert len({words[3] for words in train}) == 1
    assert train[0][3].startswith("MASTER=n1:2")
    assert not (submission.folder / "x").exists()


def test_what_follows_a_failure_never_starts(submission: Submission) -> None:
    submission.behave("[[ $2 != unified_rl.rollout || $RANK != 1 ]] || exit 3")
    ids = submission.submit("loop")
    fields = submission.cluster.wait_state(ids["train-0000"], DONE)
    assert fields["JobState"] == "CANCELLED"
    assert not any("reward" in line or "train" in line for line in submission.calls())


def test_a_stop_requeues_one_task_and_the_chain_waits_for_it(submission: Submission) -> None:
    submission.behave(
        "if [[ $2 == unified_rl.rollout && $RANK == 1 && ${SLURM_RESTART_COUNT:-0} == 0 ]]; then trap 'exit 75' USR2\n"
        "for ((i = 0; i < 600; i++)); do sleep .1; done; fi\n" + MARK
    )
    ids = submission.submit("loop")
    job = f"{ids['rollout-0000']}_1"
    wait_for(lambda: len(submission.calls_of("rollout")) == 2, 60, submission.log)
    submission.cluster.call("scancel", "--batch", "--signal=USR2", job)
    wait_for(lambda: submission.cluster.job(job)["JobState"] != "RUNNING", 60, submission.log)
    fields = submission.cluster.wait_state(job, ("COMPLETED", "FAILED"))
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1")
    assert "RANK=1" in submission.calls_of("rollout")[2]
    assert submission.cluster.wait_state(ids["report-0001"], DONE)["JobState"] == "COMPLETED"
    assert len(submission.calls_of("train")) == 2


def test_the_number_of_requeues_is_bounded(submission: Submission) -> None:
    submission.behave("exit 75")
    ids = submission.submit("reward", "--iteration", "0", MAX_REQUEUES="1")
    fields = submission.cluster.wait_state(f"{ids['reward-0000']}_1", ("COMPLETED", "FAILED"))
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "75:0", "1")
    assert len([line for line in submission.calls() if "RANK=1" in line]) == 2
    assert "after 1 requeues" in submission.log()


@pytest.mark.timeout(600)
def test_a_stage_that_stops_only_at_its_time_limit_is_requeued_too(submission: Submission) -> None:
    submission.behave(
        "trap '' USR2; trap 'exit 75' TERM\n"
        "((${SLURM_RESTART_COUNT:-0})) || for ((i = 0; i < 3000; i++)); do sleep .1; done"
    )
    job = submission.submit("reward", "--iteration", "0", TIME="00:01:00", SIGNAL_SECONDS="1")["reward-0000"]
    for task in range(2):
        fields = submission.cluster.wait_state(f"{job}_{task}", ("COMPLETED", "FAILED", "CANCELLED"), 240)
        assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), submission.log()
