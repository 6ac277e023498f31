"""Kill -9 of the writer of a shard and of a stage's workers, at chosen bytes and at random moments."""

import io
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset  # noqa: F401  imported before forking: the children must not spend their lives on it

from unified_rl import ledger, shards
from unified_rl.config import BackboneConfig, DataConfig, RunConfig
from unified_rl.files import sha256_file
from unified_rl.ledger import Run
from unified_rl.manifests import LedgerError, ShardInfo, temporaries_in
from unified_rl.shards import read_shard, write_shard

NAME = "shard-00000.tar"
OLD = [("a_00", {"json": b"{}", "png": b"x" * 700})]
NEW = [("n_00", {"json": b"new", "png": b"y" * 25_000})]


def run_forked(work: Callable[[], object], kill_after: float | None = None) -> int:
    """Run `work` in a forked process; its exit code, or minus the signal that ended it.

    Neither the process nor the caller afterwards knows what the other has seen in a folder, as processes do not that
    were started one after the other.

    Args:
        work: An exception in it ends the process with code 1.
        kill_after: Seconds until the process is killed with SIGKILL, if it is still at work.
    """
    child = os.fork()
    if child == 0:
        code = 1
        temporaries_in.cache_clear()
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    temporaries_in.cache_clear()
    return ended


def kill_self(*_: object) -> None:
    """End this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def info_of(path: Path) -> ShardInfo:
    return ShardInfo(path.name, 1, sha256_file(path), path.stat().st_size)


def read_all(path: Path, info: ShardInfo) -> list:
    return list(read_shard(path.parent, info, ("json", "png")))


# One shard


class DyingFile(io.FileIO):
    """Kills its process once `limit` bytes are on the disk."""

    limit = 0

    def write(self, data):
        room = self.limit - self.tell()
        if len(data) > room:
            super().write(bytes(data)[: max(room, 0)])
            kill_self()
        return super().write(data)


@pytest.fixture(scope="module")
def infos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("infos")
    return write_shard(folder / "old" / NAME, OLD), write_shard(folder / "new" / NAME, NEW)


@pytest.mark.parametrize("limit", [0, 1, 511, 512, 513, 1024, 10239, 10240, 10241, 20480, 26000, 30719])
def test_kill_after_so_many_bytes(tmp_path, infos, limit):
    old, new = infos
    write_shard(tmp_path / NAME, OLD)

    def work():
        DyingFile.limit = limit
        shards._create = lambda path: DyingFile(path, "xb")
        write_shard(tmp_path / NAME, NEW)

    assert run_forked(work) == -signal.SIGKILL
    stale = [name for name in os.listdir(tmp_path) if name != NAME]
    assert len(stale) == 1
    assert (tmp_path / stale[0]).stat().st_size == limit
    assert read_all(tmp_path / NAME, old) == OLD
    assert write_shard(tmp_path / NAME, NEW) == new
    assert os.listdir(tmp_path) == [NAME]


@pytest.mark.parametrize(("call", "replaced"), [("fsync", False), ("replace", False), ("open", True)])
def test_kill_before_a_system_call(tmp_path, infos, call, replaced):
    old, new = infos
    write_shard(tmp_path / NAME, OLD)

    def work():
        setattr(os, call, kill_self)  # os.open is first called for the fsync of the folder, after the rename
        write_shard(tmp_path / NAME, NEW)

    assert run_forked(work) == -signal.SIGKILL
    assert info_of(tmp_path / NAME) == (new if replaced else old)
    assert write_shard(tmp_path / NAME, NEW) == new
    assert os.listdir(tmp_path) == [NAME]


def test_kill_at_random_moments(tmp_path, infos):
    rng = random.Random(0)

    def work():
        while True:
            write_shard(tmp_path / NAME, OLD)
            write_shard(tmp_path / NAME, NEW)

    write_shard(tmp_path / NAME, OLD)
    seen = set()
    for _ in range(40):
        assert run_forked(work, kill_after=rng.uniform(0.001, 0.03)) == -signal.SIGKILL
        now = info_of(tmp_path / NAME)
        assert now in infos
        seen.add(now)
        read_all(tmp_path / NAME, now)
        assert len(os.listdir(tmp_path)) <= 2, "temporary files pile up"
    assert len(seen) == 2, "the kills never hit both halves: the test shows nothing"


# A stage of several workers


def open_run(path: Path) -> Run:
    return Run(path, RunConfig(backbone=BackboneConfig(path="assets:none"), data=DataConfig(prompts="none")))


SHARDS = 4


def worker(path: Path, rank: int, world_size: int) -> None:
    """What a stage does: skip marked shards, write the others, commit when all are there."""
    run = open_run(path)
    with run.lock(f"rollout-{rank}"):
        for index in range(rank, SHARDS, world_size):
            if run.shard_mark(0, "rollout", index) is not None:
                continue
            samples = [(f"p{index}_{j:02d}", {"json": b"{}", "png": bytes([j]) * 4000}) for j in range(3)]
            info = write_shard(run.stage_folder(0, "rollout") / f"shard-{index:05d}.tar", samples)
            run.mark_shard(0, "rollout", index, info, {"groups": 1, "images": 3})
            run.write_status(stage="rollout", done=index)
        run.commit_if_complete(0, "rollout", SHARDS, "base")


def content_of(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted((path / "iter_0000").rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("undisturbed")
    worker(path, 0, 1)
    content = content_of(path)
    assert len(content) == 2 * SHARDS + 1
    return content


def test_killed_and_restarted_stage_ends_with_the_same_bytes(tmp_path, undisturbed):
    start = time.monotonic()
    assert run_forked(lambda: worker(tmp_path / "timing", 0, 1)) == 0
    duration = time.monotonic() - start
    rng = random.Random(0)
    progress = set()
    for life in range(40):
        path = tmp_path / str(life // 4)  # ten stages, each killed four times
        run_forked(lambda path=path: worker(path, 0, 1), kill_after=rng.uniform(0.1, 0.9) * duration)
        marked = len(list(path.glob("iter_0000/rollout/*.done.json")))
        manifest = open_run(path).manifest(0, "rollout")
        progress.add((marked, manifest is not None))
        for info in manifest.shards if manifest else ():  # whole the moment the manifest exists
            assert len(list(read_shard(path / "iter_0000/rollout", info, ("png",)))) == 3
    assert len(progress) > 2, "the kills all hit the same moment: the test shows nothing"
    for stage in range(10):
        assert run_forked(lambda path=tmp_path / str(stage): worker(path, 0, 1)) == 0
        assert content_of(tmp_path / str(stage)) == undisturbed


@pytest.mark.parametrize("step", [*range(1, 12), *range(34, 41)])
def test_kill_before_every_fsync_and_rename(tmp_path, undisturbed, step):
    def dying(path=tmp_path):
        calls = [0]

        def count(function):
            def counted(*arguments):
                calls[0] += 1
                if calls[0] == step:
                    kill_self()
                return function(*arguments)

            return counted

        os.fsync, os.replace = count(os.fsync), count(os.replace)
        worker(path, 0, 1)

    code = run_forked(dying)
    assert code in (0, -signal.SIGKILL)
    # A file costs three calls (fsync, rename, fsync of the folder); a shard has a tar, a mark and a status.
    assert (code == -signal.SIGKILL) == (step <= 3 * (3 * SHARDS + 1))
    assert run_forked(lambda: worker(tmp_path, 0, 1)) == 0
    assert content_of(tmp_path) == undisturbed


def test_several_workers_end_with_the_same_bytes(tmp_path, undisturbed):
    for world_size in (2, 3):
        path = tmp_path / str(world_size)
        children = []
        for rank in range(world_size):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    worker(path, rank, world_size)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * world_size
        assert content_of(path) == undisturbed


def test_many_committers_at_once(tmp_path, undisturbed):
    worker(tmp_path, 0, 1)
    manifest = tmp_path / "iter_0000/rollout/manifest.json"
    for _ in range(5):
        manifest.unlink()
        children = []
        for _ in range(6):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    code = 0 if open_run(tmp_path).commit_if_complete(0, "rollout", SHARDS, "base") else 2
                finally:
                    os._exit(code)
            children.append(child)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
        assert content_of(tmp_path) == undisturbed


def test_second_process_is_refused_and_a_killed_one_frees_the_lock(tmp_path):
    ready, go = os.pipe()

    def hold():
        with open_run(tmp_path).lock("rollout-0"):
            os.write(go, b"x")
            time.sleep(60)

    child = os.fork()
    if child == 0:
        try:
            hold()
        finally:
            os._exit(1)
    os.read(ready, 1)
    run = open_run(tmp_path)
    try:
        with (
            pytest.raises(LedgerError, match=rf"already at work on rollout-0 .*process {child}"),
            run.lock("rollout-0"),
        ):
            pass
        with run.lock("rollout-1"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with run.lock("rollout-0"):
        pass


def test_commit_never_sees_a_shard_without_its_mark(tmp_path):
    def dying():
        ledger.store = kill_self  # after the shard, before its mark
        worker(tmp_path, 0, 1)

    assert run_forked(dying) == -signal.SIGKILL
    run = open_run(tmp_path)
    assert (tmp_path / "iter_0000/rollout" / NAME).is_file()
    assert run.shard_mark(0, "rollout", 0) is None
    assert run.commit_if_complete(0, "rollout", 1, "base") is None
