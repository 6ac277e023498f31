"""What a run writes, the refusal of a disk that is too small, shards that go, and a disk that fills up in mid-write."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_tools.check_shards import check_run
from tests.made_run import finish, open_made_run, use_painter
from unified_rl import disk
from unified_rl.config import ConfigError, load_run_config, resolve
from unified_rl.disk import DiskError, Written, drop_old_shards, expected, require_room, trained_numbers, weight_shapes
from unified_rl.files import atomic_write_bytes
from unified_rl.ledger import Run
from unified_rl.manifests import REMOVED
from unified_rl.records import RolloutRecord
from unified_rl.report.html import render
from unified_rl.report.timing import append_timing
from unified_rl.report.truth import read_truth
from unified_rl.reward.stage import reward
from unified_rl.rollout import stage as rollout_stage
from unified_rl.rollout.stage import rollout
from unified_rl.runtime import DISK_ERRORS, EXIT_OK, Ranks, StageError
from unified_rl.shards import ShardError, read_records
from unified_rl.status import status_text

ONE = Ranks(0, 0, 1)
SIZE = 128  # bytes of a shard of `shards`


# Checkpoint files


def shards(folder: Path) -> Path:
    """A checkpoint in two shards with an index."""
    names = {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}
    for name, file in names.items():
        save_file({name: torch.zeros(2, 3)}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def test_shapes_of_all_shards(tmp_path):
    assert weight_shapes(shards(tmp_path)) == {"a.weight": (2, 3), "b.weight": (2, 3)}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model-2.safetensors").unlink(), "lacks model-2.safetensors"),
        (
            lambda f: os.truncate(f / "model-2.safetensors", SIZE - 1),
            f"has {SIZE - 1} bytes, its header promises {SIZE};",
        ),
        (lambda f: (f / "model-1.safetensors").write_bytes(b"\xff" * 64), "model-1.safetensors is no safetensors file"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "is not an index"),
        (lambda f: [p.unlink() for p in f.iterdir()], "has no \\*.safetensors"),
    ],
)
def test_damaged_checkpoints_are_named(tmp_path, damage, message):
    damage(shards(tmp_path))
    with pytest.raises(DiskError, match=message):
        weight_shapes(tmp_path)


@pytest.mark.parametrize("family", ["janus", "bagel"])
@pytest.mark.parametrize("scope", ["full", "lora"])
def test_trained_numbers_are_those_of_the_model(family, scope):
    from unified_rl.memory import network

    config = resolve(f"gvu_{family}_shapes", ["data.prompts=x", f"train.scope={scope}", "train.lora.rank=3"])
    assert trained_numbers(config) == network(config.backbone.path, "float32").train(scope, (3, 6), recompute=False)


# Room


def test_bytes_by_hand():
    """Janus: 32 x 32 pixels, 16 tokens with log-probs of 8 bytes; references only where GRPO needs them."""
    config = resolve("gvu_janus_shapes", ["data.prompts=x", "data.prompts_per_iteration=10", "rollout.group_size=4"])
    written = expected(config)
    assert written.rollout == 40 * (3 * 32 * 32 + 16 * 8 + disk.RECORD)
    assert written.reward == 40 * (16 * 8 + disk.RECORD)
    assert written.checkpoint == 12 * trained_numbers(config) + (1 << 20)
    # BAGEL: 32 x 32 pixels are 4 x 4 x 16 latent numbers; 8 steps, 7 of them decisions.
    config = resolve("gvu_bagel_shapes", ["data.prompts=x", "data.prompts_per_iteration=10", "rollout.group_size=4"])
    assert expected(config).rollout == 40 * (3 * 32 * 32 + 4 * 256 * (1 + 8) + disk.RECORD)
    assert expected(config).reward == 40 * (4 * 256 * 7 + disk.RECORD)


def test_bytes_of_the_loop_of_questions_by_hand():
    """Two images with three questions each, of 24 tokens, thirteen answers and a greedy one of 8 tokens."""
    config = resolve("self_consistency_janus_shapes", ["data.prompts_per_iteration=2"])
    asked = expected(config, 0)
    assert asked.rollout == 2 * (3 * 32 * 32 + 3 * 12 * (24 + 14 * 8) + disk.RECORD)
    assert expected(config, 3).rollout == 2 * 8 * (3 * 32 * 32 + 16 * 8 + disk.RECORD)  # drawings
    one = replace(config, reward=replace(config.reward, method="gvu"))
    assert trained_numbers(config) == 3 * trained_numbers(one)  # an adapter for each role, on the same modules


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        use_painter(patch)
        return finish(open_made_run(tmp_path_factory.mktemp("made"), "data.keep_rollouts=1", "evaluate.questions=0"))


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "run")
    return Run(tmp_path / "run", finished.config)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_drawn(run, monkeypatch):
    shutil.rmtree(run.iteration_folder(1))
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    with pytest.raises(DiskError, match=r"iteration 1 of .* needs .* MiB more \(rollout .*, the disk has 0.0 MiB"):
        rollout(run, 1, ONE)
    assert not (run.iteration_folder(1) / "rollout").exists()


def test_what_is_there_counts_and_the_last_iteration_tells_the_sizes(run, monkeypatch):
    written = disk.expected_next(run, 1)
    assert written.rollout == int(disk.SPARE * sum(shard.bytes for shard in run.require_manifest(0, "rollout").shards))
    there = sum(path.stat().st_size for path in run.iteration_folder(1).rglob("*.tar"))
    needed = int(disk.SPARE * written.total) - there
    monkeypatch.setattr(disk, "free_bytes", lambda path: needed)
    require_room(run, 1)
    monkeypatch.setattr(disk, "free_bytes", lambda path: needed - 1)
    with pytest.raises(DiskError):
        require_room(run, 1)


def test_room_is_asked_of_the_nearest_folder(tmp_path):
    assert disk.free_bytes(tmp_path / "not" / "there") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    assert disk.gib(3 * 2**29) == "1.5 GiB"
    assert str(Written(2**20, 0, 0, 2**31)) == "rollout 1.0 MiB, reward 0.0 MiB, policy 0.0 MiB, checkpoint 2.0 GiB"


# Old shards


def tars(run: Run) -> list[str]:
    return sorted({str(path.parent.relative_to(run.path)) for path in run.path.glob("iter_*/**/*.tar")})


def test_old_shards_go_and_manifests_say_so(run, capsys):
    before = run.require_manifest(0, "reward")
    drop_old_shards(run, 0)
    assert tars(run) == ["iter_0000/reward", "iter_0000/rollout", "iter_0001/reward", "iter_0001/rollout"]
    drop_old_shards(run, 1)
    assert tars(run) == ["iter_0001/reward", "iter_0001/rollout"]
    after = run.require_manifest(0, "reward")
    assert after.shards_removed and after.extra == {**before.extra, REMOVED: True}
    assert (after.shards, after.counts) == (before.shards, before.counts)
    # Everything that reads a run goes on.
    assert rollout(run, 0, ONE) == reward(run, 0, ONE) == EXIT_OK
    assert check_run(run.path) == []
    assert "were removed" in capsys.readouterr().out
    assert read_truth(run.path).scored() == [1]
    assert "Work done" in render(read_truth(run.path))
    assert "2/2 removed" in status_text(run.path)
    with pytest.raises(ShardError, match="data.keep_rollouts"):
        list(read_records(run.iteration_folder(0) / "rollout", run.require_manifest(0, "rollout"), RolloutRecord))


def test_a_crash_between_manifest_and_shards_is_made_good(run, monkeypatch):
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        drop_old_shards(run, 1)
    monkeypatch.undo()
    assert run.require_manifest(0, "rollout").shards_removed
    drop_old_shards(run, 1)
    assert tars(run) == ["iter_0001/reward", "iter_0001/rollout"]


def test_all_are_kept_by_default_and_a_negative_number_is_refused(run):
    run.config.data.keep_rollouts = 0
    drop_old_shards(run, 1)
    assert len(tars(run)) == 4
    with pytest.raises(ConfigError, match="data.keep_rollouts=-1"):
        resolve("gvu_janus_shapes", ["data.prompts=x", "data.keep_rollouts=-1"])


# A disk that fills up


def content(run: Run) -> dict[str, bytes]:
    files = sorted(path for stage in ("rollout", "reward") for path in run.path.glob(f"iter_0000/{stage}/*"))
    return {str(path.relative_to(run.path)): path.read_bytes() for path in files}


def test_a_disk_that_fills_up_leaves_a_run_that_goes_on(finished, small_disk, monkeypatch):
    """It grows by a page whenever a stage stops, so that it fills up in every file in turn."""
    use_painter(monkeypatch)
    monkeypatch.setattr(rollout_stage, "require_room", lambda run, iteration: None)  # someone else filled it later
    small_disk.resize(64)
    (small_disk.folder / "run").mkdir()
    shutil.copy(finished.path / "config.yaml", small_disk.folder / "run")
    run, pages, stopped = Run(small_disk.folder / "run", load_run_config(small_disk.folder / "run")), 16, set()
    for stage in (rollout, reward):
        name = stage.__name__
        while run.manifest(0, name) is None:
            try:
                with run.lock(f"{name}-0"):
                    stage(run, 0, ONE)
            except (StageError, OSError) as error:
                assert isinstance(error, StageError) or error.errno in DISK_ERRORS
                assert os.strerror(errno.ENOSPC) in str(error) and str(run.path) in str(error)
                stopped.add(str(error))
                pages += 1
                small_disk.resize(4 * pages)
    assert len(stopped) > 4, "the disk never filled up in different places: the test shows nothing"
    assert content(run) == content(finished)
    assert not list(small_disk.folder.rglob("*.tmp"))


def test_every_write_on_a_full_disk_names_its_file(finished, small_disk):
    run = Run(small_disk.folder / "run", finished.config)
    (run.path / ".locks").mkdir(parents=True)
    descriptor = os.open(small_disk.folder / "ballast", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="No space left"):
        while True:
            os.write(descriptor, bytes(4096))
    os.close(descriptor)
    with pytest.raises(OSError, match="No space left.*run/.locks/train.lock"), run.lock("train"):
        pass
    with pytest.raises(OSError, match="No space left.*run/metrics.jsonl"):
        atomic_write_bytes(run.path / "metrics.jsonl", b"{}")
    with pytest.raises(OSError, match="No space left.*run/timings.jsonl"):
        append_timing(run.path, "train", 0, 1.0)
