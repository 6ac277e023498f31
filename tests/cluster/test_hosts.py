"""Training on two hosts without SLURM: both ways to start it, a stop, and a cable that is pulled in mid-training."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import ADDRESSES, Host, child_of, missing_programs, namespaces_allowed, two_hosts
from tests.cluster.small_run import (
    ENVIRONMENT,
    ROOT,
    arguments,
    copy_stages,
    held_in_the_middle,
    pack_prompts,
    processes_of,
    status_of,
)
from tests.cluster.waiting import wait_for
from tests.drill.comparison import snapshot

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
TIMEOUT = 40


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    if missing := missing_programs():
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: iproute2, openssh-client, openssh-server, pdsh)")
    if os.geteuid() != 0 or not namespaces_allowed():
        pytest.skip("hosts are made of namespaces, which takes root and a kernel that permits it")
    with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


class Training:
    """A drawn and scored iteration, and ways to train it on two hosts."""

    def __init__(self, hosts: tuple[Host, Host], folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.prompts = pack_prompts(folder / "prompts")
        self.scored = folder / "scored"
        (folder / "hostfile").write_text("host-1 slots=1\nhost-2 slots=1\n")
        for stage in ("rollout", "reward"):
            command = ["bash", str(ROOT / f"launch/{stage}.sh"), "--iteration", "0", *self.arguments(self.scored)]
            subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=600)
        self.whole = snapshot(self.train_by_hand()).files

    def arguments(self, run: Path) -> list[str]:
        return arguments(run, self.prompts, f"train.timeout_s={TIMEOUT}")

    def run(self, name: str) -> Path:
        return copy_stages(self.scored, self.folder / name, "rollout", "reward")

    def start(self, host: Host, run: Path, **variables: str) -> subprocess.Popen[bytes]:
        """launch/train.sh on a host; its output is added to NAME.log."""
        log = open(self.log(run), "ab")  # noqa: SIM115 - the process writes to it
        environment = {**ENVIRONMENT, "DS_HOSTFILE": str(self.folder / "hostfile"), **variables}
        command = host.command("bash", str(ROOT / "launch/train.sh"), "--iteration", "0", *self.arguments(run))
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def log(self, run: Path) -> Path:
        return run.with_suffix(".log")

    def train_by_hand(self) -> Path:
        """Started on each host, without ssh."""
        run = self.run("by hand")
        shared = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29411"}
        started = [self.start(host, run, NODE_RANK=str(rank), **shared) for rank, host in enumerate(self.hosts)]
        assert [process.wait(300) for process in started] == [0, 0], self.log(run).read_text()
        return run

    def train_over_ssh(self, run: Path) -> subprocess.Popen[bytes]:
        """Started on the first host, which starts the second."""
        return self.start(self.hosts[0], run)


@pytest.fixture(scope="module")
def training(hosts: tuple[Host, Host], tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(hosts, tmp_path_factory.mktemp("training"))


def test_a_stop_reaches_both_hosts_and_the_same_command_goes_on(training: Training) -> None:
    run = training.run("stopped")
    process = training.train_over_ssh(run)
    with held_in_the_middle(run, "train", training.log(run).read_text):
        os.kill(child_of(process.pid), signal.SIGTERM)
    assert process.wait(120) == 75, training.log(run).read_text()
    wait_for(lambda: not processes_of(run, "train"), 60, training.log(run).read_text)
    assert not (run / "iter_0000/train/manifest.json").exists()
    assert training.train_over_ssh(run).wait(300) == 0, training.log(run).read_text()
    assert snapshot(run).files == training.whole


def test_a_host_that_is_cut_off_is_named_and_the_same_command_goes_on(training: Training) -> None:
    run = training.run("cut off")
    process = training.train_over_ssh(run)
    with held_in_the_middle(run, "train", training.log(run).read_text):
        training.hosts[1].cable("down")
    start = time.monotonic()
    try:
        assert process.wait(TIMEOUT + 120) not in (0, 75)
        print(f"the command ended {time.monotonic() - start:.0f} s after the cut, train.timeout_s={TIMEOUT}")
        wait_for(lambda: not processes_of(run, "train"), TIMEOUT + 60, training.log(run).read_text)
    finally:
        training.hosts[1].cable("up")
    log = training.log(run).read_text()
    assert "error: rank 1 on host-2 cannot be reached" in log, log
    assert re.search("blocked: train: .* failed: .*TrainError: rank 1 on host-2 cannot be reached", status_of(run))
    assert training.train_over_ssh(run).wait(300) == 0, training.log(run).read_text()
    assert snapshot(run).files == training.whole
