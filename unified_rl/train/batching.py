"""Who computes what: global batches that do not depend on the ranks, equal work on every rank.

A rank that runs one forward more than another hangs ZeRO-3, so every rank gets the same number of
micro-batches of the same size. Empty places hold a real sample with weight zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MicroBatch:
    """One forward of one rank: positions of samples and their weights (1, or 0 for padding)."""

    samples: list[int]
    weights: list[float]


def permuted(n: int, seed: int) -> list[int]:
    """A permutation of `range(n)`; the same for the same seed on every machine."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def global_batches(groups: Sequence[int], groups_per_step: int, seeds: Sequence[int]) -> list[list[int]]:
    """Groups of each optimiser step, one pass over all groups per seed.

    Each pass permutes the groups and splits them into `round(len / groups_per_step)` (at least one) batches
    whose sizes differ by one at most, so that no step is much noisier than the others.
    """
    steps = []
    for seed in seeds if groups else ():
        order = [groups[i] for i in permuted(len(groups), seed)]
        count = max(1, round(len(groups) / groups_per_step))
        bounds = [len(order) * i // count for i in range(count + 1)]
        steps += [order[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    return steps


def micro_batches_per_rank(samples: int, world_size: int, micro_batch: int) -> int:
    """Number of forwards that each rank needs for a global batch."""
    return -(-samples // (world_size * micro_batch))


def micro_batches(samples: Sequence[int], rank: int, world_size: int, micro_batch: int) -> list[MicroBatch]:
    """This rank's share of a global batch; the ranks' shares are disjoint and cover it.

    Neighbours stay together (samples of a group share a prompt, which keeps padding of prompts small).
    """
    if not samples:
        raise ValueError("a global batch needs at least one sample")
    per_rank = micro_batches_per_rank(len(samples), world_size, micro_batch) * micro_batch
    mine = list(samples[rank * per_rank : (rank + 1) * per_rank])
    weights = [1.0] * len(mine) + [0.0] * (per_rank - len(mine))
    mine += [samples[0]] * (per_rank - len(mine))
    return [
        MicroBatch(mine[i : i + micro_batch], weights[i : i + micro_batch]) for i in range(0, per_rank, micro_batch)
    ]
