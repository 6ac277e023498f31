"""Partitions for another number of ranks, against partitions that were cut from the whole."""

import pytest
import torch

from unified_rl.train.partitions import TrainError, cut_anew, piece_size

SIZES = [7, 1, 12, 3, 5]
STEP = torch.tensor(4.0)


def written(world_size, groups):
    """What DeepSpeed writes on `world_size` ranks, parameters of SIZES in sub-groups of so many."""
    assert sum(groups) == len(SIZES)
    wholes = {name: [scale * torch.arange(1, n + 1.0) + n for n in SIZES] for name, scale in KEYS.items()}
    parts = []
    for rank in range(world_size):
        flats = {name: [flat(tensors, rank, world_size) for tensors in split(wholes[name], groups)] for name in KEYS}
        state = {
            i: {"step": STEP, "exp_avg": flats["exp_avg"][i], "exp_avg_sq": flats["exp_avg_sq"][i]}
            for i in range(len(groups))
        }
        inner = {"state": state, "param_groups": [{"lr": 0.1, "params": list(range(len(groups)))}]}
        parts.append({"zero_stage": 3, "fp32_flat_groups": flats["fp32"], "optimizer_state_dict": inner})
    return parts


KEYS = {"fp32": 1.0, "exp_avg": 0.5, "exp_avg_sq": 0.25}


def split(items, groups):
    items = list(items)
    return [[items.pop(0) for _ in range(count)] for count in groups]


def flat(tensors, rank, world_size):
    pieces = []
    for tensor in tensors:
        padded = torch.zeros(piece_size(len(tensor), world_size) * world_size)
        padded[: len(tensor)] = tensor
        pieces.append(padded.chunk(world_size)[rank])
    return torch.cat(pieces)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.mark.parametrize("old, groups", [(2, [5]), (3, [2, 3]), (1, [5]), (4, [1, 1, 3])])
@pytest.mark.parametrize("new, new_groups", [(1, [5]), (2, [3, 2]), (3, [5]), (9, [4, 1])])
def test_cut_anew_equals_cut_from_the_whole(old, groups, new, new_groups):
    expected = written(new, new_groups)
    parts = written(old, groups)
    for rank in range(new):
        assert same(cut_anew(parts, split(SIZES, new_groups), rank, new), expected[rank])


def test_other_parameters_are_refused():
    with pytest.raises(TrainError, match="not a checkpoint of these parameters"):
        cut_anew(written(2, [5]), [[7, 1, 12, 3, 9]], 0, 3)
