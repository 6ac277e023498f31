"""The real stages under SLURM: a whole loop; the same bits after requeue, cancellation, time limit and preemption."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.cluster.conftest import Cluster
from tests.cluster.small_run import (
    ENVIRONMENT,
    ROOT,
    arguments,
    copy_stages,
    held_in_the_middle,
    pack_prompts,
    status_of,
    was_sent,
)
from tests.cluster.waiting import wait_for
from tests.drill.comparison import snapshot

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
# The nodes n1 and n2 are names of SLURM only.
SITE = {"GPU_OPTION": "", "TRAIN_NODES": "2", "SETUP": "export MASTER_ADDR=127.0.0.1 PYTHONUNBUFFERED=1"}


class Runs:
    """One undisturbed run by SLURM, whose bits all others must end with, and the means to submit others."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.prompts = pack_prompts(folder / "prompts")
        self.whole = folder / "a whole run's"
        self.finish(self.submit(self.whole, "loop"))
        self.bits = snapshot(self.whole).files

    def submit(self, run: Path, what: str, **site: str) -> dict[str, str]:
        """Job ids by name, of the loop or of a stage of iteration 0."""
        settings = self.folder / "site.env"
        settings.write_text("".join(f"{key}='{value}'\n" for key, value in {**SITE, **site}.items()))
        iteration = [] if what == "loop" else ["--iteration", "0"]
        result = subprocess.run(
            [str(ROOT / "launch/slurm/submit.sh"), what, *iteration, *arguments(run, self.prompts)],
            env={**ENVIRONMENT, **self.cluster.environment, "SLURM_SITE": str(settings)}, cwd=self.folder,
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return {name: job for job, name in (line.split() for line in result.stdout.splitlines())}

    def finish(self, jobs: dict[str, str]) -> None:
        """Wait for all jobs, which must succeed."""
        for name, job in jobs.items():
            fields = self.cluster.wait_state(job, seconds=600)
            assert fields["JobState"] == "COMPLETED", f"{name}: {fields}\n{self.logs()}"

    def copy(self, name: str, *stages: str) -> Path:
        return copy_stages(self.whole, self.folder / name, *stages)

    def logs(self) -> str:
        paths = sorted(self.folder.glob("*/slurm/logs/*.out"))
        return "\n".join(f"{path}:\n{path.read_text()[-2000:]}" for path in paths) + self.cluster.logs()


@pytest.fixture(scope="module")
def runs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(cluster, tmp_path_factory.mktemp("runs"))


def test_one_iteration_on_two_nodes_ends_with_a_report(runs: Runs) -> None:
    assert (runs.whole / "iter_0000" / "train" / "manifest.json").is_file()
    assert (runs.whole / "report.html").is_file()


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_other_launchers_train_the_same_bits(launcher: str, runs: Runs) -> None:
    run = runs.copy(launcher, "rollout", "reward")
    runs.finish(runs.submit(run, "train", TRAIN_LAUNCHER=launcher))
    assert snapshot(run).files == runs.bits


def test_requeued_in_the_middle_of_training(runs: Runs) -> None:
    run = runs.copy("requeued", "rollout", "reward")
    jobs = runs.submit(run, "train")
    with held_in_the_middle(run, "train", runs.logs):
        runs.cluster.call("scontrol", "requeue", jobs["train-0000"])
    runs.cluster.wait_state(jobs["train-0000"], ("PENDING",))
    runs.finish(jobs)
    assert runs.cluster.job(jobs["train-0000"])["Restarts"] == "1"
    assert snapshot(run).files == runs.bits


def test_cancelled_in_the_middle_of_the_reward(runs: Runs) -> None:
    run = runs.copy("cancelled", "rollout")
    jobs = runs.submit(run, "loop")
    with held_in_the_middle(run, "reward", runs.logs):
        runs.cluster.call("scancel", *jobs.values())
    for job in jobs.values():
        assert runs.cluster.wait_state(job)["JobState"] == "CANCELLED"
    assert not (run / "iter_0000" / "reward" / "manifest.json").exists()
    runs.finish(runs.submit(run, "loop"))
    assert snapshot(run).files == runs.bits


def test_a_time_limit_strikes_in_the_middle_of_the_rollout(runs: Runs) -> None:
    run = runs.copy("limited")
    job = runs.submit(run, "rollout", TIME="01:00:00", SIGNAL_SECONDS="600")["rollout-0000"]
    with held_in_the_middle(run, "rollout", runs.logs) as workers:
        drawn = {path: path.stat().st_mtime_ns for path in (run / "iter_0000/rollout").glob("shard-*.done.json")}
        runs.cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=9")
        # SLURM looks at time limits every half a minute.
        wait_for(lambda: all(was_sent(pid, signal.SIGUSR2) for pid in workers), 120, runs.logs)
        runs.cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # or it would strike again
    restarts = [runs.cluster.wait_state(f"{job}_{task}", seconds=600) for task in range(2)]
    assert [fields["JobState"] for fields in restarts] == ["COMPLETED"] * 2, runs.logs()
    assert {fields["Restarts"] for fields in restarts} <= {"0", "1"}
    assert "stopped on request before shard" in "".join(p.read_text() for p in (run / "slurm/logs").glob("*.out"))
    assert {path: path.stat().st_mtime_ns for path in drawn} == drawn, "what was drawn before is not drawn again"
    assert snapshot(run).files == {name: bits for name, bits in runs.bits.items() if "/rollout/" in name}


def test_preempted_in_the_middle_of_training(runs: Runs) -> None:
    run = runs.copy("preempted", "rollout", "reward")
    jobs = runs.submit(run, "train")
    with held_in_the_middle(run, "train", runs.logs):
        options = ["--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
        urgent = runs.cluster.call("sbatch", *options, "--wrap=true").strip()
        # SLURM wakes the processes up, asks them to end, and waits for them.
        wait_for(lambda: runs.cluster.job(jobs["train-0000"])["JobState"] != "RUNNING", 240, runs.logs)
    assert runs.cluster.wait_state(urgent)["JobState"] == "COMPLETED"
    runs.finish(jobs)
    assert runs.cluster.job(jobs["train-0000"])["Restarts"] == "1"
    assert "TERM received: stopping" in "".join(p.read_text() for p in (run / "slurm/logs").glob("*.out"))
    assert snapshot(run).files == runs.bits


def test_a_failure_ends_the_chain_and_status_says_why(runs: Runs) -> None:
    run = runs.copy("failing")
    hidden = runs.prompts.rename(runs.folder / "hidden")
    try:
        jobs = runs.submit(run, "loop")
        states = {name: runs.cluster.wait_state(job)["JobState"] for name, job in jobs.items()}
    finally:
        hidden.rename(runs.prompts)
    assert states.pop("rollout-0000") == "FAILED"
    assert set(states.values()) == {"CANCELLED"}
    blocked = [line for line in status_of(run).splitlines() if line.startswith("blocked: rollout-")]
    assert len(blocked) == 2, status_of(run)
    assert all("failed:" in line and str(runs.prompts) in line for line in blocked)
