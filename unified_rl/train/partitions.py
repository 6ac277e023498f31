"""ZeRO-3's partitions of the optimizer, cut anew for another number of ranks.

ZeRO-3 cuts every parameter into as many equal pieces as there are ranks, the last one filled up with zeros. The flat
tensors of a rank hold its pieces in the order of the parameters, in sub-groups that follow one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from unified_rl.runtime import StageError

WEIGHTS, STATES = "fp32_flat_groups", "optimizer_state_dict"


class TrainError(StageError):
    """Training cannot go on; the message says why and what to do."""


@torch.no_grad()
def cut_anew(written: Sequence[dict], sizes: Sequence[Sequence[int]], rank: int, world_size: int) -> dict:
    """The optimizer's checkpoint for `rank` of `world_size`, as DeepSpeed loads it.

    Args:
        written: those of all ranks that wrote, in order.
        sizes: numbers in each parameter, for each sub-group of the rank that loads.

    Raises:
        TrainError: they are not checkpoints of these parameters.
    """
    states = [part[STATES]["state"] for part in written]
    weights = _cut([_joined(part[WEIGHTS]) for part in written], sizes, rank, world_size)
    values: dict[str, list[Any]] = {}
    for name, value in states[0][0].items():
        if torch.is_tensor(value) and value.shape == written[0][WEIGHTS][0].shape:
            flats = [_joined([state[i][name] for i in sorted(state)]) for state in states]
            values[name] = _cut(flats, sizes, rank, world_size)
        else:  # the number of the step
            values[name] = [value] * len(sizes)
    state = {i: {name: each[i] for name, each in values.items()} for i in range(len(sizes))}
    group = {**written[0][STATES]["param_groups"][0], "params": list(range(len(sizes)))}
    return {**written[0], WEIGHTS: weights, STATES: {"state": state, "param_groups": [group]}}


def _joined(flats: Sequence[torch.Tensor]) -> torch.Tensor:
    return flats[0] if len(flats) == 1 else torch.cat(list(flats))


def _cut(
    flats: Sequence[torch.Tensor], sizes: Sequence[Sequence[int]], rank: int, world_size: int
) -> list[torch.Tensor]:
    """This rank's flat tensor of each sub-group, from those of all ranks that wrote."""
    expected = sum(piece_size(size, len(flats)) for group in sizes for size in group)
    if any(flat.numel() != expected for flat in flats):
        raise TrainError(
            f"the checkpoint holds partitions of {flats[0].numel()} numbers for {len(flats)} ranks, this model's have "
            f"{expected}: it is not a checkpoint of these parameters"
        )
    groups, start = [], 0
    for group in sizes:
        pieces = []
        for size in group:
            old, new = piece_size(size, len(flats)), piece_size(size, world_size)
            whole = torch.cat([flat[start : start + old] for flat in flats])[:size]
            mine = whole[rank * new : (rank + 1) * new]
            pieces.append(torch.nn.functional.pad(mine, (0, new - len(mine))))
            start += old
        groups.append(torch.cat(pieces))
    return groups


def piece_size(size: int, world_size: int) -> int:
    """Numbers of a parameter that each rank holds, filled up."""
    return -(-size // world_size)
