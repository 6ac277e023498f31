"""Regions of an image to be judged: proposals from a grid, from the pixels or from the user, and box geometry (SRUM 3).

A box is (x1, y1, x2, y2) in whole pixels, x2 and y2 just outside. The paper takes Segment Anything's masks; a
proposer needs no more than to return `Region`s, so the ones here, which need no model, can stand in its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unified_rl.manifests import strict_json
from unified_rl.record_parts import MAX_IMAGE_SIDE, PROMPT_ID
from unified_rl.runtime import StageError

Box = tuple[int, int, int, int]


class RegionError(StageError):
    """A file of boxes that cannot be used; the message names file and line."""


@dataclass(frozen=True)
class Region:
    """A proposal: its box, and the pixels it covers inside of it (by which proposals are ranked)."""

    box: Box
    area: int


@dataclass(frozen=True)
class RegionRules:
    """Which proposals are kept.

    Attributes:
        max_regions: the largest by covered area; 10 in the paper.
        max_iou: of two boxes that overlap by more (intersection over union), the one with less area goes.
        min_share, max_share: bounds on the box's share of the image.
    """

    max_regions: int = 10
    max_iou: float = 0.9
    min_share: float = 0.005
    max_share: float = 0.95


# The paper says that regions are filtered but gives no numbers; the released code only ranks and cuts at ten.
REGION_RULES = {"srum": RegionRules(), "srum_release": RegionRules(10, max_iou=1.0, min_share=0.0, max_share=1.0)}


@dataclass(frozen=True)
class UserBoxes:
    """Boxes that the user gives for one prompt, in pixels of a frame of height x width; fractions are allowed."""

    height: int
    width: int
    boxes: tuple[tuple[float, float, float, float], ...]


def box_area(box: Box) -> int:
    """Pixels in a box; 0 where it is empty."""
    x1, y1, x2, y2 = box
    return max(0, x2 - x1) * max(0, y2 - y1)


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union, 0..1."""
    common = box_area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = box_area(a) + box_area(b) - common
    return common / union if union else 0.0


def clip_box(box: Box, height: int, width: int) -> Box | None:
    """The part of a box inside the image; None where nothing is left."""
    x1, y1, x2, y2 = max(0, box[0]), max(0, box[1]), min(width, box[2]), min(height, box[3])
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def scale_box(box: Sequence[float], from_size: tuple[int, int], to_size: tuple[int, int]) -> Box | None:
    """A box of a frame `from_size` (H, W) in the frame `to_size`, as when the image is resized; None outside of it.

    Rounded outwards, so that no box is lost to shrinking.
    """
    down, across = to_size[0] / from_size[0], to_size[1] / from_size[1]
    # Without the tolerance 0.1 * 30 = 3.0000000000000004 would reach into a fourth pixel.
    left, top = (math.floor(v * s + 1e-9) for v, s in zip(box[:2], (across, down), strict=True))
    right, bottom = (math.ceil(v * s - 1e-9) for v, s in zip(box[2:], (across, down), strict=True))
    return clip_box((left, top, right, bottom), *to_size)


def grid_regions(height: int, width: int, rows: int, columns: int) -> list[Region]:
    """The cells of a grid over the image in reading order; all of them together cover each pixel once.

    Raises:
        ValueError: more cells than pixels, or none.
    """
    if not (1 <= rows <= height and 1 <= columns <= width):
        raise ValueError(f"a grid of {rows} x {columns} cells does not fit an image of {height} x {width} pixels")
    ys = [row * height // rows for row in range(rows + 1)]
    xs = [column * width // columns for column in range(columns + 1)]
    boxes = [(xs[j], ys[i], xs[j + 1], ys[i + 1]) for i in range(rows) for j in range(columns)]
    return [Region(box, box_area(box)) for box in boxes]


def component_regions(image: np.ndarray, tolerance: int = 24) -> list[Region]:
    """Connected areas of similar colour, in reading order of their first pixels. Unfiltered: a noisy image has many.

    Args:
        image: uint8 [H, W, 3].
        tolerance: two neighbours (above, below, left, right) belong together when no channel differs by more grey
            levels than this.

    Raises:
        ValueError: not such an image.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    height, width = image.shape[:2]
    labels = _component_labels(image.astype(np.int16), tolerance)
    _, labels = np.unique(labels, return_inverse=True)
    ys, xs = np.divmod(np.arange(height * width), width)
    count = int(labels.max()) + 1
    first = np.full((2, count), max(height, width))
    last = np.zeros((2, count), dtype=np.int64)
    for axis, positions in enumerate((xs, ys)):
        np.minimum.at(first[axis], labels, positions)
        np.maximum.at(last[axis], labels, positions + 1)
    boxes = np.concatenate([first, last]).T.tolist()
    areas = np.bincount(labels).tolist()
    return [Region(tuple(box), area) for box, area in zip(boxes, areas, strict=True)]


def filter_regions(regions: Sequence[Region], height: int, width: int, rules: RegionRules) -> list[Region]:
    """Regions within the size bounds, the largest first, without near-duplicates, at most `rules.max_regions`."""
    kept: list[Region] = []
    for region in sorted(regions, key=lambda r: -r.area):
        share = box_area(region.box) / (height * width)
        fits = box_area(region.box) > 0 and rules.min_share <= share <= rules.max_share
        if len(kept) < rules.max_regions and fits and all(box_iou(region.box, k.box) <= rules.max_iou for k in kept):
            kept.append(region)
    return kept


def user_regions(given: UserBoxes, height: int, width: int) -> list[Region]:
    """The user's boxes on an image of another size, in their order and unfiltered: whoever gives boxes means them."""
    scaled = [scale_box(box, (given.height, given.width), (height, width)) for box in given.boxes]
    return [Region(box, box_area(box)) for box in scaled if box is not None]


def load_boxes(path: Path) -> dict[str, UserBoxes]:
    """Boxes by prompt id from a JSONL file.

    A line is `{"prompt_id": "p1", "image_size": [HEIGHT, WIDTH], "boxes": [[x1, y1, x2, y2], ...]}`: boxes with
    x1 < x2 and y1 < y2 inside a frame of that size. An empty list: no region is judged, so the whole map is background.

    Raises:
        RegionError: an unreadable file, or a line that is not like that; names file and line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RegionError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RegionError(f"{path}: not UTF-8 text") from None
    boxes: dict[str, UserBoxes] = {}
    first: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        prompt_id, entry = _parse_line(line, f"{path}:{number}")
        if prompt_id in boxes:
            raise RegionError(f"{path}:{number}: prompt_id {prompt_id} is already on line {first[prompt_id]}")
        boxes[prompt_id], first[prompt_id] = entry, number
    return boxes


def _parse_line(line: str, where: str) -> tuple[str, UserBoxes]:
    try:
        content = strict_json(line)
    except (ValueError, RecursionError) as error:
        raise RegionError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(content, dict) or set(content) != {"prompt_id", "image_size", "boxes"}:
        raise RegionError(f"{where}: expected an object with exactly prompt_id, image_size and boxes")
    prompt_id, size, boxes = content["prompt_id"], content["image_size"], content["boxes"]
    if not isinstance(prompt_id, str) or not PROMPT_ID.fullmatch(prompt_id):
        raise RegionError(f"{where}: prompt_id {prompt_id!r} must match {PROMPT_ID.pattern}")
    whole = isinstance(size, list) and len(size) == 2 and all(type(v) is int for v in size)
    if not whole or not all(1 <= v <= MAX_IMAGE_SIDE for v in size):
        raise RegionError(f"{where}: image_size must be [height, width] in 1..{MAX_IMAGE_SIDE} pixels, not {size!r}")
    if not isinstance(boxes, list):
        raise RegionError(f"{where}: boxes must be a list of [x1, y1, x2, y2]")
    for number, box in enumerate(boxes, 1):
        _check_box(box, size[0], size[1], f"{where}: box {number}")
    return prompt_id, UserBoxes(size[0], size[1], tuple(tuple(box) for box in boxes))


def _check_box(box: object, height: int, width: int, where: str) -> None:
    if not isinstance(box, list) or len(box) != 4 or not all(type(v) in (int, float) for v in box):
        raise RegionError(f"{where} is not [x1, y1, x2, y2]: {box!r}")
    x1, y1, x2, y2 = box
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise RegionError(f"{where} {box} is empty, inverted or not inside {width} x {height} pixels (width x height)")


def _component_labels(image: np.ndarray, tolerance: int) -> np.ndarray:
    """int64 [H * W]: for each pixel of int16 [H, W, 3] the lowest index in its component.

    Every root hooks itself below the lowest root among its neighbours, then all paths are halved: the rounds grow with
    the logarithm of the image, where a flood fill in Python would visit every pixel.
    """
    indices = np.arange(image.shape[0] * image.shape[1]).reshape(image.shape[:2])
    across = np.abs(np.diff(image, axis=1)).max(axis=2) <= tolerance
    down = np.abs(np.diff(image, axis=0)).max(axis=2) <= tolerance
    a = np.concatenate([indices[:, :-1][across], indices[:-1][down]])
    b = np.concatenate([indices[:, 1:][across], indices[1:][down]])
    parent = indices.ravel().copy()
    while True:
        roots_a, roots_b = parent[a], parent[b]
        apart = roots_a != roots_b
        if not apart.any():
            return parent
        a, b = a[apart], b[apart]
        low, high = np.minimum(roots_a, roots_b)[apart], np.maximum(roots_a, roots_b)[apart]
        np.minimum.at(parent, high, low)
        while True:
            grand = parent[parent]
            if np.array_equal(grand, parent):
                break
            parent = grand
