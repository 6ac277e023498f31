"""Run folder: marks, manifests, policies, and their refusals. Kills are in test_crashes.py."""

import json
import math
import os
import shutil

import pytest

from unified_rl import manifests
from unified_rl.config import BackboneConfig, DataConfig, RunConfig
from unified_rl.files import sha256_file
from unified_rl.ledger import Run, merge_summaries
from unified_rl.manifests import (
    LedgerError,
    Manifest,
    ShardInfo,
    decode_json,
    encode_json,
    read_manifest,
    write_manifest,
)
from unified_rl.shards import write_shard

DIGEST = "ab" * 32


def make_run(path, **values) -> Run:
    return Run(path, RunConfig(backbone=BackboneConfig(path="assets:none"), data=DataConfig(prompts="none"), **values))


@pytest.fixture
def run(tmp_path) -> Run:
    return make_run(tmp_path / "run")


def put_shard(run, index, stage="rollout", iteration=0, content=b"tar") -> ShardInfo:
    """Any file: the ledger looks at names, sizes and checksums only."""
    path = run.stage_folder(iteration, stage) / f"shard-{index:05d}.tar"
    path.write_bytes(content * (index + 1))
    return ShardInfo(path.name, 2, sha256_file(path), path.stat().st_size)


def finish_shard(run, index, stage="rollout", iteration=0, **summary):
    run.mark_shard(iteration, stage, index, put_shard(run, index, stage, iteration), summary)


def train_manifest(run, iteration, **extra) -> Manifest:
    return Manifest("train", iteration, [], "base", run.config_hash, {"steps": 4}, [], extra)


# Manifests


def example(run) -> Manifest:
    info = ShardInfo("shard-00000.tar", 2, DIGEST, 10)
    return Manifest(
        "rollout", 3, [info], "base", run.config_hash, {"groups": 1, "images": 2}, [{"key": "a"}], {"x": 0.5}
    )


def test_manifest_round_trip(run):
    run.commit(example(run))
    assert run.manifest(3, "rollout") == example(run)
    assert run.manifest(2, "rollout") is None
    assert run.manifest(3, "reward") is None
    text = (run.path / "iter_0003/rollout/manifest.json").read_text()
    assert json.loads(text)["schema"] == 1


def test_manifest_bytes_depend_on_content_only(run, tmp_path):
    run.commit(example(run))
    first = (run.path / "iter_0003/rollout/manifest.json").read_bytes()
    other = make_run(tmp_path / "other")
    other.commit(example(other))
    assert (other.path / "iter_0003/rollout/manifest.json").read_bytes() == first
    assert str(os.getpid()) not in json.loads(first)


def test_every_changed_byte_of_a_manifest_is_found(run):
    run.commit(example(run))
    path = run.path / "iter_0003/rollout/manifest.json"
    data = path.read_bytes()
    for position in range(len(data) - 1):
        damaged = bytearray(data)
        damaged[position] ^= 0x01
        path.write_bytes(damaged)
        if position and data[position] in b" \n" and damaged[position] in b" \n\t\r":
            continue
        with pytest.raises(LedgerError, match="manifest.json"):
            run.manifest(3, "rollout")
    for length in range(len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(LedgerError, match="manifest.json"):
            run.manifest(3, "rollout")


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_other_schema_versions(tmp_path, version):
    content = {**json.loads(encode_json({"a": 1})), "schema": version}
    with pytest.raises(LedgerError, match=r"some file has schema version .* reads version 1"):
        decode_json(json.dumps(content).encode(), "some file")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shards", [{"name": "a.tar"}], "must have exactly"),
        ("shards", [{"name": "../a.tar", "count": 1, "sha256": DIGEST, "bytes": 1}], "plain NAME.tar"),
        ("shards", [{"name": "/a.tar", "count": 1, "sha256": DIGEST, "bytes": 1}], "plain NAME.tar"),
        ("shards", [{"name": "a.tar", "count": -1, "sha256": DIGEST, "bytes": 1}], "whole numbers"),
        ("shards", [{"name": "a.tar", "count": 1, "sha256": "xyz", "bytes": 1}], "no SHA-256"),
        ("shards", [{"name": "a.tar", "count": 1, "sha256": DIGEST, "bytes": 1}] * 2, "listed twice"),
        ("iteration", True, "must be a int"),
        ("iteration", -1, "at least 0"),
        ("counts", {"images": 1.5}, "at least 0"),
        ("failures", ["a"], "must be an object"),
        ("stage", None, "must be a str"),
        ("extra", [], "must be a dict"),
    ],
)
def test_impossible_manifests(tmp_path, field, value, message):
    content = {
        "stage": "rollout", "iteration": 0, "shards": [], "policy_version": "base", "config_hash": "", "counts": {},
        "failures": [], "extra": {}, field: value,
    }  # fmt: skip
    (tmp_path / "manifest.json").write_bytes(encode_json(content))
    with pytest.raises(LedgerError, match=rf"manifest\.json.*{message}"):
        read_manifest(tmp_path)


def test_missing_and_unknown_fields(tmp_path):
    (tmp_path / "manifest.json").write_bytes(encode_json({"stage": "rollout", "colour": 1}))
    with pytest.raises(LedgerError, match="colour.*counts"):
        read_manifest(tmp_path)


def test_nan_is_not_written(run):
    manifest = example(run)
    manifest.extra["reward_mean"] = math.nan
    with pytest.raises(LedgerError, match="JSON"):
        run.commit(manifest)
    assert run.manifest(3, "rollout") is None


def test_commit_again_and_commit_something_else(run):
    run.commit(example(run))
    run.commit(example(run))
    other = example(run)
    other.counts["images"] = 3
    with pytest.raises(LedgerError, match="already committed with different content"):
        run.commit(other)
    assert run.manifest(3, "rollout") == example(run)


def test_manifest_in_the_wrong_place_or_of_another_configuration(run, tmp_path):
    run.commit(example(run))
    shutil.copytree(run.path / "iter_0003", run.path / "iter_0004")
    with pytest.raises(LedgerError, match="iter_0004.*manifest of rollout, iteration 3"):
        run.manifest(4, "rollout")
    other = make_run(run.path, seed=99)
    with pytest.raises(LedgerError, match=f"made with configuration {run.config_hash}"):
        other.manifest(3, "rollout")
    with pytest.raises(LedgerError, match="configuration"):
        other.commit(example(run))


def test_require_manifest_names_stage_and_command(run):
    with pytest.raises(LedgerError, match=r"rollout of iteration 5 .*-m unified_rl\.rollout --run .* --iteration 5"):
        run.require_manifest(5, "rollout")


def test_full_disk_names_the_file_and_keeps_the_old_one(run, monkeypatch):
    write_manifest(run.stage_folder(0, "rollout"), Manifest("rollout", 0, [], "base", "", {}))
    path = run.path / "iter_0000/rollout/manifest.json"
    before = path.read_bytes()

    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(LedgerError, match=r"manifest\.json could not be written: No space left on device"):
        write_manifest(path.parent, Manifest("rollout", 0, [], "other", "", {}))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["manifest.json"]


def test_temporaries_of_killed_writers_are_removed(run):
    folder = run.stage_folder(3, "rollout")
    (folder / ".manifest.json.123.tmp").write_bytes(b"half")
    run.commit(example(run))
    assert os.listdir(folder) == ["manifest.json"]


def test_work_of_marking_shards_grows_with_their_number_not_with_its_square(run, monkeypatch):
    listed, real = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda *where: listed.append(where) or real(*where))
    folder = run.stage_folder(0, "rollout")
    for index in range(50):
        run.mark_shard(0, "rollout", index, write_shard(folder / f"shard-{index:05d}.tar", [("k", {"json": b"1"})]), {})
    assert len(listed) <= 1


def test_a_writer_that_lost_its_temporary_tries_again(tmp_path, monkeypatch):
    real, calls = manifests.atomic_write_bytes, []

    def flaky(path, data):
        calls.append(1)
        if len(calls) < 3:
            raise FileNotFoundError(2, "No such file or directory")
        real(path, data)

    monkeypatch.setattr(manifests, "atomic_write_bytes", flaky)
    manifests.store(tmp_path / "x.json", b"1")
    assert (tmp_path / "x.json").read_bytes() == b"1"


# Marks


def test_mark_round_trip(run):
    assert run.shard_mark(0, "rollout", 1) is None
    finish_shard(run, 1, images=2, failures=[{"key": "a"}])
    assert run.shard_mark(0, "rollout", 1) == {"images": 2, "failures": [{"key": "a"}]}
    assert run.shard_mark(0, "rollout", 0) is None
    assert run.shard_mark(0, "reward", 1) is None
    assert (run.path / "iter_0000/rollout/shard-00001.done.json").is_file()


@pytest.mark.parametrize("content", [b"", b"tarta", b"tarTar", b"tartartar", None])
def test_mark_of_a_changed_or_missing_shard_does_not_count(run, content):
    finish_shard(run, 1, images=2)
    path = run.path / "iter_0000/rollout/shard-00001.tar"
    assert path.read_bytes() == b"tartar"
    path.unlink() if content is None else path.write_bytes(content)
    assert run.shard_mark(0, "rollout", 1) is None
    finish_shard(run, 0, images=2)
    assert run.commit_if_complete(0, "rollout", 2, "base") is None


def test_mark_must_fit_its_shard(run):
    with pytest.raises(LedgerError, match="must be named shard-00002.tar"):
        run.mark_shard(0, "rollout", 2, put_shard(run, 1), {})


def test_damaged_mark_names_its_file(run):
    finish_shard(run, 1)
    path = run.path / "iter_0000/rollout/shard-00001.done.json"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(LedgerError, match=r"shard-00001\.done\.json"):
        run.shard_mark(0, "rollout", 1)


def test_mark_of_another_configuration_is_refused(run):
    finish_shard(run, 1)
    with pytest.raises(LedgerError, match="another configuration"):
        make_run(run.path, seed=7).shard_mark(0, "rollout", 1)


def test_shard_of_another_policy_does_not_count(run):
    run.policy_folder(0).mkdir(parents=True)
    run.commit(train_manifest(run, 0, policy_sha256=DIGEST))
    finish_shard(run, 0, iteration=1, images=2)
    assert run.shard_mark(1, "rollout", 0) == {"images": 2}
    (run.path / "iter_0000/train/manifest.json").unlink()
    run.commit(train_manifest(run, 0, policy_sha256="cd" * 32))
    assert run.shard_mark(1, "rollout", 0) is None


def test_shard_that_was_made_of_another_one_does_not_count(run):
    run.mark_shard(0, "reward", 0, put_shard(run, 0, "reward"), {"images": 1}, DIGEST)
    assert run.shard_mark(0, "reward", 0) == run.shard_mark(0, "reward", 0, DIGEST) == {"images": 1}
    assert run.shard_mark(0, "reward", 0, "cd" * 32) is None
    assert run.commit_if_complete(0, "reward", 1, "base", sources=["cd" * 32]) is None
    assert run.commit_if_complete(0, "reward", 1, "base", sources=[DIGEST]).counts == {"images": 1}
    finish_shard(run, 1)
    assert run.shard_mark(0, "rollout", 1, DIGEST) is None  # as by a version that did not say


# Commit when complete


def test_commit_when_the_last_shard_is_there(run):
    finish_shard(run, 2, groups=1, images=2, failed=1, failures=[{"key": "c"}], reward_sum=0.75)
    assert run.commit_if_complete(0, "reward", 3, "base") is None
    finish_shard(run, 0, groups=1, images=2, failed=0, failures=[], reward_sum=0.5)
    assert run.commit_if_complete(0, "rollout", 3, "base") is None
    assert run.manifest(0, "rollout") is None
    finish_shard(run, 1, groups=2, images=4, failed=1, failures=[{"key": "b"}], reward_sum=0.25)
    manifest = run.commit_if_complete(0, "rollout", 3, "base", {"note": "x"})
    assert [info.name for info in manifest.shards] == [f"shard-{i:05d}.tar" for i in range(3)]
    assert manifest.counts == {"groups": 4, "images": 8, "failed": 2}
    assert manifest.failures == [{"key": "b"}, {"key": "c"}]
    assert manifest.extra == {"reward_mean": 1.5 / 6, "note": "x"}
    assert manifest.policy_version == "base"
    assert run.manifest(0, "rollout") == manifest
    assert run.commit_if_complete(0, "rollout", 3, "base") == manifest


def test_order_of_finishing_does_not_matter(tmp_path):
    contents = set()
    for number, order in enumerate([(0, 1, 2), (2, 1, 0), (1, 2, 0)]):
        run = make_run(tmp_path / str(number))
        for index in order:
            finish_shard(run, index, images=2, reward_sum=0.1 * 3**index)
        run.commit_if_complete(0, "rollout", 3, "base")
        contents.add((run.path / "iter_0000/rollout/manifest.json").read_bytes())
    assert len(contents) == 1


def test_merge_summaries():
    assert merge_summaries([{"images": 3, "skipped": 1, "reward_sum": 1}], "x")[2] == {"reward_mean": 0.5}
    with pytest.raises(LedgerError, match="x: shard summary field note='a'"):
        merge_summaries([{"note": "a"}], "x")
    with pytest.raises(LedgerError, match="reward_sum=nan"):
        merge_summaries([{"images": 1, "reward_sum": math.nan}], "x")
    with pytest.raises(LedgerError, match="not one image has a score"):
        merge_summaries([{"images": 2, "failed": 2, "reward_sum": 0.0}], "x")


# Policies


def test_policy_of_the_first_iteration_is_the_base(run):
    assert run.current_policy(0) == (None, "base")


def test_policy_comes_from_the_iteration_before(run):
    with pytest.raises(LedgerError, match="train of iteration 2 is not finished"):
        run.current_policy(3)
    run.commit(train_manifest(run, 2, policy_sha256=DIGEST))
    with pytest.raises(LedgerError, match="policy is missing"):
        run.current_policy(3)
    run.policy_folder(2).mkdir(parents=True)
    assert run.current_policy(3) == (run.path / "iter_0002/policy", "0002-abababababab")


@pytest.mark.parametrize("extra", [{}, {"policy_sha256": None}, {"policy_sha256": "ab"}])
def test_train_manifest_without_a_digest(run, extra):
    run.commit(train_manifest(run, 0, **extra))
    with pytest.raises(LedgerError, match="no policy_sha256"):
        run.current_policy(1)


@pytest.mark.parametrize("stage", ["../x", "", "a/b", "Rollout"])
def test_stage_names(run, stage):
    with pytest.raises(LedgerError, match="no stage name"):
        run.stage_folder(0, stage)


# Status


def test_status_round_trip(run):
    assert run.read_status() is None
    run.write_status(stage="reward", iteration=2, done=3, total=4, eta_s=math.inf, reward=0.25)
    status = run.read_status()
    expected = {"state": "running", "stage": "reward", "iteration": 2, "iterations": 1, "done": 3, "total": 4,
                "eta_s": None, "reward": 0.25, "world_size": 1, "pid": os.getpid()}  # fmt: skip
    assert {name: status[name] for name in expected} == expected
    assert {"host", "updated"} < set(status)
    run.write_status(state="finished")
    assert run.read_status()["reward"] == 0.25, "the last reward is carried over"
    assert run.read_status()["state"] == "finished"


def test_unknown_status_field(run):
    with pytest.raises(LedgerError, match="unknown status field colour"):
        run.write_status(colour=1)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_unreadable_status_is_no_obstacle(run, content):
    run.path.mkdir()
    (run.path / "status.json").write_bytes(content)
    assert run.read_status() is None
    run.write_status(done=1)
    assert run.read_status()["done"] == 1
