"""Two ranks begin, one or three go on: the same curve, and not one frozen number moved."""

import shutil

import pytest
import torch

from tests.train.conftest import copy_run, draw_and_score, train_with
from tests.train.test_training import distance, metrics_of, policy_bytes, weights_of
from unified_rl.runtime import EXIT_OK
from unified_rl.train.checkpoints import folder_of, read_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CURVES = ("policy/loss", "kl", "entropy", "reward", "ratio/mean")


@pytest.fixture(scope="module")
def begun(scored_run, tmp_path_factory):
    """Iteration 0 by two ranks, iteration 1 drawn and scored."""
    folder = tmp_path_factory.mktemp("begun")
    run = copy_run(scored_run, folder / "run")
    assert train_with(2, folder / "codes", f"{run.path}:0") == [EXIT_OK]
    draw_and_score(run, 1)
    return run


@pytest.fixture(scope="module")
def straight(begun, tmp_path_factory):
    """Iteration 1 by the same two ranks."""
    folder = tmp_path_factory.mktemp("straight")
    run = copy_run(begun, folder / "run")
    assert train_with(2, folder / "codes", f"{run.path}:1") == [EXIT_OK]
    return run


@pytest.fixture(scope="module", params=[1, 3])
def continued(request, begun, straight, tmp_path_factory):
    """(ranks, the whole iteration, the policy of a finished checkpoint), and a damaged checkpoint that is refused."""
    folder = tmp_path_factory.mktemp("continued")
    whole, marked, damaged = (
        copy_run(begun, folder / "w"),
        copy_run(straight, folder / "m"),
        copy_run(begun, folder / "d"),
    )
    (marked.path / "iter_0001/train/manifest.json").unlink()
    shutil.rmtree(marked.policy_folder(1))
    name = change_a_stored_weight(damaged)
    *codes, error = train_with(request.param, folder / "codes", *(f"{r.path}:1" for r in (whole, marked, damaged)))
    assert codes == [EXIT_OK, EXIT_OK]
    assert error.startswith("TrainError") and f"holds another state than its marker says ({name})" in error
    return request.param, whole, marked


def change_a_stored_weight(run):
    """Change the first number that rank 1 stored; returns the parameter that it belongs to."""
    folder = folder_of(run, 0)
    path = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    content = torch.load(path, weights_only=False)
    content["optimizer_state_dict"]["fp32_flat_groups"][0].data[0] += 1e-3
    torch.save(content, path)
    shapes = torch.load(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt", weights_only=False)["param_shapes"]
    first = next(iter(shapes[0])).replace("__", ".")
    return next(name for name in read_checkpoint(run, 0).trained_sha256 if name.endswith(first))


def test_the_curve_goes_on(continued, straight):
    ranks, run, _ = continued
    for row, expected in zip(metrics_of(run, 1), metrics_of(straight, 1), strict=True):
        for name in CURVES:
            assert row[name] == pytest.approx(expected[name], rel=0, abs=1e-6), name
    assert distance(weights_of(run, 1), weights_of(straight, 1)) <= 1e-6
    assert run.read_status()["world_size"] == read_checkpoint(run, 1).world_size == ranks


def test_partitions_that_are_cut_anew_lose_no_bit(continued, straight):
    _, _, marked = continued
    assert policy_bytes(marked, 1) == policy_bytes(straight, 1)
    assert marked.manifest(1, "train") == straight.manifest(1, "train")


def test_every_frozen_parameter_is_the_same_after_every_resume(continued, begun):
    before = read_checkpoint(begun, 0)
    assert len(before.frozen_sha256) > 10 and not before.frozen_sha256.keys() & before.trained_sha256.keys()
    for run in continued[1:]:
        assert read_checkpoint(run, 1).frozen_sha256 == before.frozen_sha256
        assert read_checkpoint(run, 1).trained_sha256.keys() == before.trained_sha256.keys()
