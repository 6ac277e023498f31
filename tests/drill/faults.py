"""The kinds of faults: what happens to a running loop, and what it must say and do."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.drill.comparison import Snapshot
from tests.drill.loops import END_SECONDS, ITERATIONS, POLL_SECONDS, Loop, Member, members_of
from unified_rl.files import sha256_file
from unified_rl.ledger import iteration_name
from unified_rl.manifests import MANIFEST_NAME
from unified_rl.runtime import EXIT_STOPPED

DISK_MIB = 768
LEFT_BYTES = 192 << 10  # at most, on a disk that is filled
ORPHAN_SECONDS = 300
REFUSAL_SECONDS = 120


class Missed(Exception):
    """There was nothing to strike at this moment; the loop lives, or can be started again."""


@dataclass
class Struck:
    """What a fault did and how the loop took it.

    Attributes:
        what: which process, file or signal.
        message: the error that names the cause, empty where none was due.
        complaint: why the loop's answer is not acceptable, empty when it is.
        removed: path in the run that was deleted as the error says.
        damaged: path of the shard that is no longer what it was.
    """

    what: str
    message: str = ""
    complaint: str = ""
    removed: str = ""
    damaged: str = ""


@dataclass
class Field:
    """What a fault may touch: the loop, the undisturbed result, the chance, the small disk if there is one."""

    loop: Loop
    whole: Snapshot
    rng: random.Random
    disk: Path | None


def last_error(text: str) -> str:
    """The last `error:` line of what a start printed."""
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    return lines[-1] if lines else ""


def errors(text: str) -> str:
    """All `error:` lines; of several workers each may have its own."""
    return "\n".join(line for line in text.splitlines() if line.startswith("error: "))


def ended(field: Field, what: str, codes: tuple[int, ...] | None = None) -> Struck:
    """Wait for the launcher; `codes` are those that it may end with (None: any)."""
    code = field.loop.end()
    if code is None:
        field.loop.kill()
        return Struck(what, complaint=f"still running after {END_SECONDS} s")
    if codes is not None and code not in codes:
        return Struck(what, complaint=f"exit code {code}: {field.loop.said()[-500:]}")
    return Struck(what)


# ---- processes that die or are asked to stop ------------------------------------------------------------------------


def kill_rank(field: Field) -> Struck:
    """SIGKILL of one rank; its launcher must notice and end the others."""
    return kill_one(field, [m for m in field.loop.members() if m.stage])


def kill_launcher(field: Field) -> Struck:
    """SIGKILL of one launcher; what it started goes on alone, and a second start must not mix with it."""
    struck = kill_one(field, [m for m in field.loop.members() if m.launches])
    if not struck.complaint and field.loop.members():
        orphans = field.loop.process.pid
        field.loop.start()
        struck = let_orphans_end(field, orphans, struck)
    return struck


def kill_one(field: Field, candidates: list[Member]) -> Struck:
    """SIGKILL of one of the processes, then the end of the loop's launcher."""
    if not candidates:
        raise Missed
    member = field.rng.choice(sorted(candidates, key=lambda m: m.pid))
    with suppress(ProcessLookupError):
        os.kill(member.pid, signal.SIGKILL)
    return ended(field, member.module or Path(next(w for w in member.words if w.endswith(".sh"))).name)


def let_orphans_end(field: Field, session: int, struck: Struck) -> Struck:
    """Run the same command beside what the dead launcher left, until that has ended."""
    deadline = time.monotonic() + ORPHAN_SECONDS
    while any(members_of(session)):
        if time.monotonic() > deadline:
            with suppress(ProcessLookupError):
                os.killpg(session, signal.SIGKILL)
            struck.complaint = f"processes of a dead launcher were at work {ORPHAN_SECONDS} s later"
        if not field.loop.running:
            code, text = field.loop.process.returncode, field.loop.said()
            if code and "already at work" not in text:
                struck.complaint = f"a second start beside orphans ended with {code}: {text[-500:]}"
            struck.message = struck.message or last_error(text)
        time.sleep(POLL_SECONDS)
    return struck


def kill_all(field: Field) -> Struck:
    """SIGKILL of the whole tree, as a node that loses power."""
    field.loop.kill()
    return Struck("all processes")


def stop_by(number: signal.Signals) -> Callable[[Field], Struck]:
    """A signal that asks to stop, to the launcher alone, as `kill` and schedulers send it."""

    def stop(field: Field) -> Struck:
        os.kill(field.loop.process.pid, number)
        struck = ended(field, "loop.sh", (0, EXIT_STOPPED, -number))  # killed by it: before its trap was set
        if not struck.complaint and not field.loop.wait_for_orphans(10):
            left = " ".join(field.loop.members()[0].words)[:200]
            field.loop.kill()
            struck.complaint = f"the launcher ended and left processes behind: {left}"
        return struck

    return stop


# ---- disks and files ------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system in memory that can be filled; None where none can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    mounted = os.path.ismount(folder)  # by a drill that was killed
    if not mounted and (os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode):
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_disk(field: Field) -> Struck:
    """Another user's file takes the room of the run's disk, but for some kilobytes; later it is deleted."""
    ballast = field.disk / "ballast"
    left = field.rng.randrange(LEFT_BYTES)
    with open(ballast, "wb") as file, suppress(OSError):
        free = shutil.disk_usage(field.disk).free
        os.posix_fallocate(file.fileno(), 0, max(free - left, 1))
    try:
        struck = ended(field, f"{left >> 10} KiB left")
        code, text = field.loop.process.returncode, field.loop.said()
        if code and not struck.complaint:
            struck.message = last_error(text)
            named = re.search(r"^error: .*(No space left|Make room).*", text, re.MULTILINE)
            if not named or str(field.loop.run) not in named[0]:
                struck.complaint = f"the error names no file or no cause: {text[-800:]}"
    finally:
        ballast.unlink()
    return struck


def shards_to_be_read(loop: Loop) -> list[Path]:
    """Marked shards that the training of the current iteration has not read."""
    for iteration in range(ITERATIONS):
        if not loop.trained(iteration):
            marks = (loop.run / iteration_name(iteration)).glob("*/shard-*.done.json")
            return sorted(mark.with_name(mark.name.replace(".done.json", ".tar")) for mark in marks)
    return []


def damage_by(change: Callable[[Path, random.Random], str]) -> Callable[[Field], Struck]:
    """The loop dies, and a finished shard is not what it was when it is started again."""

    def damage(field: Field) -> Struck:
        loop = field.loop
        if not shards_to_be_read(loop):
            raise Missed
        loop.kill()
        shards = shards_to_be_read(loop)
        if not shards:  # trained in the meantime
            raise Missed
        shard = field.rng.choice(shards)
        name = str(shard.relative_to(loop.run))
        struck = Struck(f"{name} {change(shard, field.rng)}", damaged=name)
        loop.start()
        while loop.running and sha256_file(shard) != field.whole.files[name]:
            time.sleep(POLL_SECONDS)
        if not loop.running and loop.process.returncode:
            return refused(loop, shard, struck)
        return struck

    return damage


def refused(loop: Loop, shard: Path, struck: Struck) -> Struck:
    """The error must name the shard and say what to delete; that is done."""
    struck.message = last_error(loop.said())
    named = [line for line in errors(loop.said()).splitlines() if str(shard) in line]
    if not named or "delete the manifest of its stage" not in named[0]:
        struck.complaint = f"no error names {shard} and what to do: {loop.said()[-800:]}"
    manifest = shard.with_name(MANIFEST_NAME)
    manifest.unlink(missing_ok=True)
    struck.removed = str(manifest.relative_to(loop.run))
    return struck


def truncate(shard: Path, rng: random.Random) -> str:
    """Cut a file somewhere."""
    size = rng.randrange(shard.stat().st_size)
    os.truncate(shard, size)
    return f"cut to {size} bytes"


def flip_bit(shard: Path, rng: random.Random) -> str:
    """Change one bit of a file."""
    data = bytearray(shard.read_bytes())
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    data[place] ^= 1 << bit
    shard.write_bytes(data)
    return f"bit {bit} of byte {place} flipped"


# ---- a broken judge, two starts -------------------------------------------------------------------------------------


def judge_is_nan(field: Field) -> Struck:
    """The loop is started with a judge that returns NaN; the stage must stop, name samples, and say what to delete."""
    loop = field.loop
    loop.start(judge_is_nan=True)
    struck = ended(field, "judge")
    if struck.complaint:
        return struck
    if loop.process.returncode == 0:
        raise Missed  # no reward was left
    text = errors(loop.said())
    struck.message = last_error(text)
    told = re.search(r"First: [a-zA-Z0-9_-]+_\d\d: the judge gave a non-finite .* delete (\S+) and run", text)
    if not told or not Path(told[1]).is_relative_to(loop.run):
        struck.complaint = f"the error names no sample or no remedy: {loop.said()[-800:]}"
    else:
        shutil.rmtree(told[1])
        struck.removed = str(Path(told[1]).relative_to(loop.run))
    return struck


def send(members: list[Member], number: signal.Signals) -> None:
    """A signal to processes, of which some may have ended."""
    for member in members:
        with suppress(ProcessLookupError):
            os.kill(member.pid, number)


def start_twice(field: Field) -> Struck:
    """The running stage is started once more; one of the two must be refused, and nothing may change.

    The first one's workers sleep meanwhile: it would often be done before the second has loaded anything.
    """
    loop = field.loop
    workers = loop.workers()
    if not workers:
        raise Missed
    member = workers[0]
    send(workers, signal.SIGSTOP)
    try:
        code, text = loop.stage_again(member.stage, member.iteration)
    finally:
        send(workers, signal.SIGCONT)
    struck = Struck(f"{member.stage} {member.iteration}", last_error(text))
    if code == 0 and "already committed" not in text:  # the second was first
        deadline = time.monotonic() + REFUSAL_SECONDS
        while not (answer := re.search(r"already (at work|committed)", loop.said())) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        struck.message = "" if loop.running else last_error(loop.said())
        if not answer:
            struck.complaint = f"two starts of one stage and none was refused: {text[-500:]}"
    elif code and "already at work" not in errors(text):
        struck.complaint = f"the second start ended with {code} and no clear refusal: {text[-800:]}"
    return struck


KINDS: dict[str, Callable[[Field], Struck]] = {
    "rank killed": kill_rank,
    "launcher killed": kill_launcher,
    "all killed": kill_all,
    "TERM": stop_by(signal.SIGTERM),
    "USR2": stop_by(signal.SIGUSR2),
    "disk full": fill_disk,
    "shard truncated": damage_by(truncate),
    "bit flipped": damage_by(flip_bit),
    "judge NaN": judge_is_nan,
    "started twice": start_twice,
}
WITHOUT_START = ("judge NaN",)  # starts the loop itself
NEEDS_WORKER = ("rank killed", "started twice")
