"""Dense reward map: the judge's global and regional scores on the grid of latents or image tokens (SRUM section 3).

Regional scores are painted into a map R over the pixels, resampled to the grid, and multiplied by the global factor
`alpha = (g + 1) / 2`. The paper and the released code paint differently; `MAP_RULES` holds both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from unified_rl.reward.regions import Box, box_area, clip_box

VALUES = ("signed", "unit")
OVERLAPS = ("smallest", "max", "min", "mean", "area_weighted")
RESAMPLINGS = ("area", "bilinear")


@dataclass(frozen=True)
class MapRules:
    """How scores become a map.

    Attributes:
        values: `signed` paints a score s as it is, -1..1; `unit` as (s + 1) / 2, 0..1.
        overlap: who wins where boxes overlap. `smallest`: the box of least area, as the most specific judgement (of
            equal boxes the one listed first). `max`: the highest value, the background included, so that the
            background is a floor. `min`: the lowest value of the boxes. `mean`: their mean. `area_weighted`: their
            mean with weights 1 / area.
        background: value of pixels outside all boxes, in the scale of `values`.
        resample: `area`: mean over the pixels of a cell. `bilinear`: between the pixel centres next to the centre of
            the cell, which at 16 pixels a cell sees little of it.
        missing_alpha: alpha of an image without a global score.
        skip_zero_global: leave out images whose global score is exactly 0.
    """

    values: str = "signed"
    overlap: str = "smallest"
    background: float = 0.0
    resample: str = "area"
    missing_alpha: float = 1.0
    skip_zero_global: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("values", VALUES), ("overlap", OVERLAPS), ("resample", RESAMPLINGS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        low = -1.0 if self.values == "signed" else 0.0
        if not low <= self.background <= 1.0:
            raise ValueError(f"background must lie in {low:g}..1 for {self.values} values, not {self.background!r}")
        if not 0.0 <= self.missing_alpha <= 1.0:
            raise ValueError(f"missing_alpha must lie in 0..1, not {self.missing_alpha!r}")


# srum: the paper's equations, with signed values that repel. srum_release: what the published code computes. Its floor
# of 0.5 hides every negative score, and it drops neutral global scores because a failed reading is stored as 0 too.
MAP_RULES = {
    "srum": MapRules(),
    "srum_release": MapRules("unit", "max", 0.5, "bilinear", missing_alpha=0.5, skip_zero_global=True),
}


@dataclass(frozen=True)
class RewardMap:
    """The reward of one image.

    Attributes:
        local: fp32 [h, w], R on the grid, in -1..1.
        alpha: the global factor, 0..1.
    """

    local: torch.Tensor
    alpha: float

    @property
    def weights(self) -> torch.Tensor:
        """fp32 [h * w], alpha R in reading order: what `policy.reward_weighted.reward_weighted_loss` takes."""
        return (self.alpha * self.local).flatten()


def reward_map(
    boxes: Sequence[Box],
    scores: Sequence[float | None],
    global_score: float | None,
    image_size: tuple[int, int],
    grid_size: tuple[int, int],
    rules: MapRules = MAP_RULES["srum"],
) -> RewardMap:
    """Map of one image from its judged regions.

    Args:
        boxes: K boxes in pixels of the image; parts outside it do not count.
        scores: K numbers in -1..1; None where the judge gave no readable score: that box is not painted.
        global_score: in -1..1, or None.
        image_size: (H, W) pixels of the frame that the boxes are in.
        grid_size: (h, w) cells of the latents or tokens.
        rules: a value of `MAP_RULES`, or others.

    Raises:
        ValueError: not one score for each box, or a score that is no number in -1..1.
    """
    pixels = paint(boxes, scores, image_size, rules)
    return RewardMap(resample(pixels, grid_size, rules.resample).float(), global_factor(global_score, rules))


def global_factor(global_score: float | None, rules: MapRules) -> float:
    """alpha in 0..1, `(g + 1) / 2`: never negative, so that two bad scores do not make a good one.

    Raises:
        ValueError: a score outside -1..1.
    """
    return rules.missing_alpha if global_score is None else (_checked(global_score, "global score") + 1.0) / 2.0


def is_left_out(global_score: float | None, rules: MapRules) -> bool:
    """Whether the rules train without this image. The release stores a missing global score as 0, so drops it too."""
    return rules.skip_zero_global and not global_score


def paint(
    boxes: Sequence[Box], scores: Sequence[float | None], image_size: tuple[int, int], rules: MapRules
) -> torch.Tensor:
    """fp64 [H, W]: the local map R at pixel resolution. Arguments and errors as for `reward_map`."""
    if len(boxes) != len(scores):
        raise ValueError(f"{len(boxes)} boxes but {len(scores)} scores")
    painted = []
    for number, (box, score) in enumerate(zip(boxes, scores, strict=True), 1):
        value = None if score is None else _checked(score, f"score of region {number}")
        inside = clip_box(box, *image_size)
        if value is not None and inside is not None:
            painted.append((inside, value if rules.values == "signed" else (value + 1.0) / 2.0))
    if rules.overlap in ("mean", "area_weighted"):
        return _paint_mean(painted, image_size, rules)
    pixels = torch.full(image_size, math.nan, dtype=torch.float64)
    if rules.overlap == "smallest":
        # Last painted wins: large before small, and of equal areas the first listed at the end.
        painted = sorted(painted, key=lambda item: box_area(item[0]))[::-1]
    combine = {"smallest": lambda _, new: new, "max": torch.fmax, "min": torch.fmin}[rules.overlap]
    for (x1, y1, x2, y2), value in painted:
        view = pixels[y1:y2, x1:x2]
        view.copy_(combine(view, torch.full_like(view, value)))
    pixels = pixels.nan_to_num(nan=rules.background)
    return pixels.clamp_min(rules.background) if rules.overlap == "max" else pixels


def resample(pixels: torch.Tensor, grid_size: tuple[int, int], method: str) -> torch.Tensor:
    """[h, w] of a map [H, W]; `method` as in `MapRules.resample`. Neither leaves the range of the map."""
    if method == "bilinear":
        return F.interpolate(pixels[None, None], grid_size, mode="bilinear", align_corners=False)[0, 0]
    rows = _cell_overlap(grid_size[0], pixels.shape[0]).to(pixels.dtype)
    columns = _cell_overlap(grid_size[1], pixels.shape[1]).to(pixels.dtype)
    return rows @ pixels @ columns.T


def _cell_overlap(cells: int, pixels: int) -> torch.Tensor:
    """fp64 [cells, pixels]: share of each cell that each pixel covers; exact where cells cut pixels, too.

    torch's own `area` mode widens the windows of sizes that do not divide, so that neighbours share pixels.
    """
    edges = torch.arange(cells + 1, dtype=torch.float64) * pixels / cells
    left, right = torch.arange(pixels), torch.arange(1, pixels + 1)
    covered = torch.minimum(edges[1:, None], right) - torch.maximum(edges[:-1, None], left)
    return covered.clamp_min(0.0) * cells / pixels


def _paint_mean(painted: list[tuple[Box, float]], image_size: tuple[int, int], rules: MapRules) -> torch.Tensor:
    """Mean of the values over each pixel, each box with the same weight or with 1 / area."""
    total = torch.zeros(image_size, dtype=torch.float64)
    weight = torch.zeros(image_size, dtype=torch.float64)
    for box, value in painted:
        x1, y1, x2, y2 = box
        share = 1.0 / box_area(box) if rules.overlap == "area_weighted" else 1.0
        total[y1:y2, x1:x2] += share * value
        weight[y1:y2, x1:x2] += share
    return torch.where(weight > 0, total / weight, torch.full_like(total, rules.background))


def _checked(score: float, name: str) -> float:
    if isinstance(score, bool) or not isinstance(score, int | float) or not -1.0 <= score <= 1.0:
        raise ValueError(f"{name} is {score!r}, not a number in -1..1")
    return float(score)
