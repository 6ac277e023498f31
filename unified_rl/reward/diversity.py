"""How much each image of a group adds to its variety (Ask-Solve-Generate, arXiv 2606.27376); off unless asked for.

The reward goes to the outlier, whether it is original or wrong: weigh it lightly.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F

GREY_SIDE, BINS = 96, 32
GREY_WEIGHT, GREY_SCALE, COLOUR_SCALE = 0.6, 0.30, 0.25


def diversity_scores(images: Sequence[np.ndarray]) -> list[float]:
    """Leave-one-out share of each of L uint8 [H, W, 3] images in the variety of the group, largest 1.

    All 0 where no image adds anything.

    Raises:
        ValueError: fewer than two images.
    """
    if len(images) < 2:
        raise ValueError("variety needs at least two images")
    grey, colours = _grey(images), _colours(images)
    everyone = list(range(len(images)))
    whole = _variety(grey, colours, everyone)
    added = [max(whole - _variety(grey, colours, [j for j in everyone if j != i]), 0.0) for i in everyone]
    largest = max(added)
    return [a / largest if largest > 0 else 0.0 for a in added]


def _variety(grey: torch.Tensor, colours: torch.Tensor, members: Sequence[int]) -> float:
    """Of a set, in 0..1, from similarities [L, L] of its pictures and of its colours; 0 for a single image."""
    pairs = list(combinations(members, 2))
    if not pairs:
        return 0.0
    first, second = (list(side) for side in zip(*pairs, strict=True))
    apart = float((1.0 - grey[first, second]).mean()), float((1.0 - colours[first, second]).mean())
    return GREY_WEIGHT * min(1.0, apart[0] / GREY_SCALE) + (1.0 - GREY_WEIGHT) * min(1.0, apart[1] / COLOUR_SCALE)


def _grey(images: Sequence[np.ndarray]) -> torch.Tensor:
    """fp64 [L, L]: cosines of the pictures as grey values on a square of GREY_SIDE. Black is unlike all."""
    rows = []
    for image in images:
        pixels = torch.from_numpy(np.ascontiguousarray(image)).double().mean(-1)[None, None]
        rows.append(F.interpolate(pixels, (GREY_SIDE, GREY_SIDE), mode="bilinear", antialias=True).flatten())
    unit = F.normalize(torch.stack(rows), dim=1)
    return unit @ unit.T


def _colours(images: Sequence[np.ndarray]) -> torch.Tensor:
    """fp64 [L, L]: Bhattacharyya coefficients of the histograms with BINS bins, mean over the three channels."""
    rows = []
    for image in images:
        bins = torch.from_numpy(np.ascontiguousarray(image)).reshape(-1, 3).long() * BINS // 256
        rows.append(torch.stack([torch.bincount(bins[:, c], minlength=BINS) for c in range(3)]).double() / len(bins))
    roots = torch.stack(rows).sqrt()
    return torch.einsum("icb,jcb->ij", roots, roots) / 3.0
