"""A SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd on the loopback."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.waiting import wait_for

DONE = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
RESTART_SECONDS = 5  # the nodes refuse a job that comes back in the second in which it ended
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=600
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{node_port}-{last_port}] CPUs=4 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP GraceTime=120
PartitionName=urgent Nodes=n[1-2] PriorityTier=9 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """Environment in which the commands of SLURM talk to the cluster, and the folder of its logs."""

    folder: Path
    environment: dict[str, str]

    def call(self, *command: str, unless: str | None = None) -> str:
        """Output of a command of SLURM, which may only fail with the error `unless`."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0 or (unless and unless in result.stderr), result.stderr
        return result.stdout

    def job(self, identifier: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        words = self.call("scontrol", "--oneliner", "show", "job", identifier).splitlines()[0].split()
        return dict(word.partition("=")[::2] for word in words if "=" in word)

    def wait_state(self, identifier: str, states: tuple[str, ...] = DONE, seconds: float = 300) -> dict[str, str]:
        """Fields of a job once it is in one of the states; a requeued job does not wait for its time to begin."""
        fields: dict[str, str] = {}
        released = time.monotonic() + RESTART_SECONDS

        def reached() -> bool:
            nonlocal released
            fields.update(self.job(identifier))
            if (fields["JobState"], fields["Reason"]) != ("PENDING", "BeginTime"):  # two minutes after a requeue
                released = time.monotonic() + RESTART_SECONDS
            elif time.monotonic() > released:
                # SLURM may have started it in the meantime.
                update = ("scontrol", "update", f"JobId={identifier}", "StartTime=now")
                self.call(*update, unless="Job is no longer pending execution")
            return fields["JobState"] in states

        wait_for(reached, seconds, lambda: f"{fields}\n{self.logs()}")
        return fields

    def logs(self) -> str:
        """The last lines of all daemons."""
        return "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("*.log")))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Started for the session; its processes are ended one by one afterwards."""
    # The daemons lie in /usr/sbin, which an ordinary user's PATH may lack.
    search = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=search) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: slurmctld, slurmd, slurm-client, munge)")
    if os.geteuid() != 0:
        pytest.skip("slurmd needs root to start jobs")
    folder = tmp_path_factory.mktemp("slurm")
    environment = {**os.environ, "PATH": search, "SLURM_CONF": str(folder / "slurm.conf")}
    processes = start(folder, environment)
    try:
        made = Cluster(folder, environment)
        wait_for(lambda: ready(made), 60, made.logs)
        yield made
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True, timeout=60)
        time.sleep(1)
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def start(folder: Path, environment: dict[str, str]) -> list[subprocess.Popen[bytes]]:
    """munged, slurmctld, slurmd n1, slurmd n2; each in the foreground of its own process."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    base = 17001 + os.getpid() % 2000 * 2
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            host=socket.gethostname().split(".")[0], user="root", folder=folder, port=free_port(), node_port=base,
            last_port=base + 1,
        )
    )  # fmt: skip
    munge = [
        "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
        f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed",
    ]  # fmt: skip
    commands = [munge, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    processes = []
    for command in commands:
        log = open(folder / f"{command[0]}-{len(processes)}.out.log", "wb")  # noqa: SIM115 - the process writes to it
        processes.append(
            subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        )
        log.close()
        if command is munge:
            wait_for((folder / "munge.socket").exists, 20, lambda: (folder / "munged.log").read_text())
    return processes


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def ready(cluster: Cluster) -> bool:
    """Whether both nodes take jobs."""
    result = subprocess.run(
        ["sinfo", "--noheader", "--partition=main", "--Node", "--format=%N %T"],
        env=cluster.environment,
        capture_output=True,
        text=True,
    )
    return result.returncode == 0 and result.stdout.split() == ["n1", "idle", "n2", "idle"]
