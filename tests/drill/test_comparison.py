"""The drill is worth something only if its comparison notices what can go wrong."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.drill.__main__ import Fault, summary_of, table
from tests.drill.comparison import committed, snapshot
from unified_rl.manifests import Manifest, write_manifest
from unified_rl.records import PromptRecord
from unified_rl.shards import write_records

WEIGHTS = "iter_0000/policy/model.safetensors"
METRICS = "iter_0000/train/metrics.jsonl"
SHARD = "iter_0000/rollout/shard-00001.tar"


def write_metrics(run, *steps, seconds=1.0):
    rows = [{"step": step, "reward": 0.5, "time/step_s": seconds, "solver/time/step_s": seconds} for step in steps]
    (run / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_keys(run, index, *keys):
    return write_records(
        run / f"iter_0000/rollout/shard-{index:05d}.tar", [PromptRecord(key, "a ring") for key in keys]
    )


@pytest.fixture
def whole(tmp_path):
    """What matters of a finished run: two shards, metrics, weights."""
    run = tmp_path / "whole"
    infos = [write_keys(run, 0, "a", "b"), write_keys(run, 1, "c", "d")]
    for index in range(2):
        (run / f"iter_0000/rollout/shard-{index:05d}.done.json").write_text("{}")
    write_manifest(run / "iter_0000/rollout", Manifest("rollout", 0, infos, "base", "", {"images": 4}))
    (run / "iter_0000/train").mkdir()
    write_metrics(run, 1, 2)
    (run / "iter_0000/policy").mkdir()
    save_file({"w": torch.ones(3)}, run / WEIGHTS)
    return run


@pytest.fixture
def run(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def found(run, whole):
    return snapshot(run).differences(snapshot(whole))


def test_the_same_bits_and_other_times_are_identical(run, whole):
    write_metrics(run, 1, 2, seconds=7.5)
    assert found(run, whole) == []


def test_a_changed_weight(run, whole):
    save_file({"w": torch.tensor([1.0, 1.0, 1.0 + 2**-23])}, run / WEIGHTS)
    assert found(run, whole) == [("wrong", WEIGHTS)]


@pytest.mark.parametrize("name", [WEIGHTS, METRICS, SHARD, "iter_0000/rollout/manifest.json"])
def test_a_lost_file(run, whole, name):
    (run / name).unlink()
    assert ("lost", name) in found(run, whole)


def test_a_lost_record(run, whole):
    write_keys(run, 1, "c")
    assert found(run, whole) == [("lost", "iter_0000/rollout d"), ("wrong", SHARD)]


def test_a_duplicated_record(run, whole):
    write_keys(run, 1, "c", "d", "a")
    assert found(run, whole) == [("duplicated", "iter_0000/rollout a"), ("wrong", SHARD)]
    write_keys(run, 1, "c", "d")
    write_keys(run, 2, "c")
    assert ("duplicated", "iter_0000/rollout c") in found(run, whole)


def test_lost_and_duplicated_metrics(run, whole):
    write_metrics(run, 1)
    assert found(run, whole)[0] == ("lost", "iter_0000/train step 2")
    write_metrics(run, 1, 2, 2)
    assert found(run, whole)[0] == ("duplicated", "iter_0000/train step 2")


@pytest.mark.parametrize("change", ["flip", "cut", "leftover"])
def test_damage_and_leftovers(run, whole, change):
    data = bytearray((run / SHARD).read_bytes())
    if change == "flip":
        data[700] ^= 1
    name = SHARD.replace("shard-00001.tar", ".shard-00001.tar.12.tmp") if change == "leftover" else SHARD
    (run / name).write_bytes(data[:600] if change == "cut" else data)
    assert ("wrong", name) in found(run, whole)
    assert (("lost", "iter_0000/rollout d") in found(run, whole)) == (change == "cut")


def test_only_marked_shards_and_stages_with_a_manifest_are_committed(run):
    (run / "iter_0000/rollout/manifest.json").unlink()
    (run / "iter_0000/rollout/shard-00000.done.json").unlink()
    assert committed(run) == {SHARD, SHARD.replace(".tar", ".done.json")}
    write_manifest(run / "iter_0000/train", Manifest("train", 0, [], "base", "", {}))
    assert {WEIGHTS, METRICS, "iter_0000/train/manifest.json"} < committed(run)


def test_summary_and_table_count_by_kind_place_and_verdict():
    faults = [
        Fault(0, "TERM", place, 0, "", "", verdict, "", 1.0)
        for place, verdict in (("reward", "identical"), ("train", "lost"), ("train", "clear_error"))
    ]
    summary = summary_of(faults, 3, ["disk full"])
    assert (summary["faults"], summary["identical"], summary["clear_error"], summary["lost"]) == (3, 1, 1, 1)
    assert summary["by_kind"]["TERM"]["at"]["train"] == 2 and summary["by_kind"]["USR2"]["faults"] == 0
    lines = table(summary).splitlines()
    assert lines[-1].split() == ["all", "3", "0", "0", "1", "2", "0", "1", "1", "1", "0", "0"]
    assert "skipped" in next(line for line in lines if line.startswith("disk full"))
