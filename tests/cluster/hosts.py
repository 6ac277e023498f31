"""Two hosts on this machine: namespaces of network, processes, mounts and name, joined by a cable that can be pulled.

They share the disk, as nodes of a cluster do. Each runs sshd on its own address and knows the other by name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.waiting import wait_for

NAMES = ("host-1", "host-2")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PROGRAMS = ("unshare", "nsenter", "ip", "ssh", "ssh-keygen", "sshd", "pdsh", "pkill")
# /run, the names of hosts and the settings of ssh are the host's own; nothing of it is seen outside.
BOOT = """
set -e
hostname "$1"; cd "$2"
mount -t tmpfs tmpfs /run; mkdir /run/sshd
mount --bind hosts /etc/hosts; mount --bind ssh_config /etc/ssh/ssh_config
ip link set lo up
touch "booted-$1"
exec sleep 3600
"""


@dataclass(frozen=True)
class Host:
    """A host; `process` is its first process, as this machine numbers it."""

    name: str
    process: int
    folder: Path

    def command(self, *words: str) -> list[str]:
        """`words` as a process of the host."""
        return ["nsenter", f"--target={self.process}", "--net", "--pid", "--mount", "--uts", f"--wd={os.getcwd()}",
                "--", *words]  # fmt: skip

    def call(self, *words: str) -> None:
        """Run to its end; failure is an error."""
        done = subprocess.run(self.command(*words), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stderr}"

    def cable(self, state: str) -> None:
        """Pull it (`down`) or plug it in (`up`)."""
        self.call("ip", "link", "set", "cable", state)


def missing_programs() -> list[str]:
    """What is not installed."""
    search = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [program for program in PROGRAMS if shutil.which(program, path=search) is None]


def namespaces_allowed() -> bool:
    """Whether this process may make hosts."""
    return subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount", "--uts", "true"]).returncode == 0


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Started, joined, with sshd; at the end everything in them is killed."""
    write_settings(folder)
    shells = []
    try:
        for name in NAMES:
            command = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts", "--"]
            shells.append(subprocess.Popen([*command, "sh", "-c", BOOT, "boot", name, str(folder)]))
            wait_for((folder / f"booted-{name}").exists, 30, lambda: "a host does not start")
        hosts = tuple(Host(name, child_of(shell.pid), folder) for name, shell in zip(NAMES, shells, strict=True))
        join(hosts)
        for host in hosts:
            host.call("/usr/sbin/sshd", "-f", str(folder / "sshd_config"))
        yield hosts
    finally:
        for shell in shells:
            shell.kill()
            shell.wait()


def write_settings(folder: Path) -> None:
    """Names, keys, and the settings of ssh and sshd."""
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    lines = [f"{address} {name}" for address, name in zip(ADDRESSES, NAMES, strict=True)]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/user_key\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    )
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\nPidFile none\n"
        "PermitRootLogin prohibit-password\n"
    )


def child_of(process: int) -> int:
    """The only child of a process."""
    return int(Path(f"/proc/{process}/task/{process}/children").read_text())


def join(hosts: tuple[Host, ...]) -> None:
    """A pair of virtual interfaces, one end in each host."""
    first, second = hosts
    subprocess.run(
        ["ip", "link", "add", "cable", "netns", str(first.process), "type", "veth", "peer", "name", "cable", "netns",
         str(second.process)],
        check=True,
    )  # fmt: skip
    for host, address in zip(hosts, ADDRESSES, strict=True):
        host.call("ip", "address", "add", f"{address}/24", "dev", "cable")
        host.cable("up")
