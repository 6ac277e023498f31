from dataclasses import replace

import pytest

from unified_rl.config import RunConfig
from unified_rl.ledger import Run
from unified_rl.train.checkpoints import (
    Checkpoint,
    clear_unfinished,
    complete,
    delete_old,
    folder_of,
    read_checkpoint,
    require_checkpoint,
)
from unified_rl.train.zero3 import TrainError


@pytest.fixture
def run(tmp_path):
    config = RunConfig()
    config.backbone.path = config.data.prompts = "x"
    return Run(tmp_path, config)


def state_of(run, iteration):
    digests = {"lm_head.weight": "f" * 16}, {"layers.0.weight": "0" * 16}
    return Checkpoint(iteration, 8 * iteration, 2, run.config_hash, *digests, {"steps": 8}, 0.25)


def write(run, iteration, whole=True):
    folder = folder_of(run, iteration)
    folder.mkdir(parents=True)
    (folder / "weights.pt").write_bytes(b"x")
    if whole:
        complete(run, state_of(run, iteration))


def test_only_a_marked_checkpoint_counts(run):
    write(run, 0, whole=False)
    assert read_checkpoint(run, 0) is None
    with pytest.raises(TrainError, match="iteration 1 continues from it"):
        require_checkpoint(run, 0)
    complete(run, state_of(run, 0))
    assert require_checkpoint(run, 0) == state_of(run, 0)


def test_the_configuration_must_match(run):
    write(run, 0)
    complete(run, replace(state_of(run, 0), config_hash="other"))
    with pytest.raises(TrainError, match="configuration other"):
        read_checkpoint(run, 0)


def test_the_newest_are_kept_and_unfinished_ones_left_alone(run):
    for iteration in range(4):
        write(run, iteration)
    write(run, 4, whole=False)
    delete_old(run, keep=2)
    assert [folder_of(run, k).exists() for k in range(5)] == [False, False, True, True, True]
    delete_old(run, keep=2)
    assert read_checkpoint(run, 3) and read_checkpoint(run, 2)


def test_leftovers_are_cleared(run):
    write(run, 0, whole=False)
    clear_unfinished(run, 0)
    assert not folder_of(run, 0).exists()
    clear_unfinished(run, 0)
