"""A disk that fills up while training writes."""

from tests.train.conftest import copy_run, train_with
from unified_rl.files import sha256_file
from unified_rl.runtime import EXIT_OK


def weights(run):
    return {path.name: sha256_file(path) for path in run.policy_folder(0).iterdir()}


def test_a_checkpoint_that_does_not_fit_is_written_once_there_is_room(scored_run, small_disk, tmp_path):
    run, whole = copy_run(scored_run, small_disk.folder / "run"), copy_run(scored_run, tmp_path / "whole")
    used = sum(path.stat().st_size + 4096 for path in small_disk.folder.rglob("*"))
    small_disk.resize(used // 1024 + 200)
    (error,) = train_with(1, tmp_path / "full", f"{run.path}:0")
    assert error.startswith("TrainError: ") and "could not be written" in error and "Make room" in error
    assert run.manifest(0, "train") is None
    small_disk.resize(64 << 10)
    assert train_with(1, tmp_path / "room", f"{run.path}:0", f"{whole.path}:0") == [EXIT_OK, EXIT_OK]
    assert weights(run) == weights(whole)
