"""Scenes, renderer and exact detector.

A picture is 32x32 RGB: a 2x2 grid of cells of 16x16 pixels, each empty or holding one coloured shape. Nothing
is jittered, so that all the entropy of a picture lies in what a prompt leaves open (which cell, which colour).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

CELL = 16  # pixels
GRID = 2  # cells a side
IMAGE_SIZE = CELL * GRID
BACKGROUND = (24, 24, 24)
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLORS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 80, 240),
    "yellow": (240, 220, 40),
    "magenta": (220, 50, 220),
    "cyan": (50, 220, 230),
}
# A cell further than this from every template shows nothing that can be named (templates differ from the empty
# cell by at least 24 and from one another by at least 5 grey levels; the nearest one counts).
MAX_DISTANCE = 9.0


@dataclass(frozen=True)
class Object:
    """One coloured shape."""

    shape: str
    color: str


Scene = tuple[Object | None, ...]  # GRID * GRID cells in reading order


@dataclass(frozen=True)
class Detection:
    """What the detector saw in one cell."""

    shape: str
    color: str
    row: int
    column: int


OBJECTS = tuple(Object(shape, color) for shape in SHAPES for color in COLORS)


def _mask(shape: str) -> np.ndarray:
    """Boolean [CELL, CELL] silhouette, centred, without anti-aliasing."""
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    radius = np.hypot(x, y)
    masks = {
        "circle": radius <= 6.6,
        "square": np.maximum(abs(x), abs(y)) <= 5.6,
        "triangle": (y >= -6) & (y <= 6) & (abs(x) <= (y + 6.6) / 2),
        "diamond": abs(x) + abs(y) <= 7.1,
        "cross": (np.minimum(abs(x), abs(y)) <= 1.6) & (np.maximum(abs(x), abs(y)) <= 6.6),
        "ring": (radius <= 6.9) & (radius >= 3.6),
    }
    return masks[shape]


@lru_cache(maxsize=1)
def templates() -> np.ndarray:
    """uint8 [1 + len(OBJECTS), CELL, CELL, 3]: the empty cell, then every object in the order of OBJECTS."""
    cells = np.empty((1 + len(OBJECTS), CELL, CELL, 3), np.uint8)
    cells[:] = BACKGROUND
    for i, item in enumerate(OBJECTS, 1):
        cells[i][_mask(item.shape)] = COLORS[item.color]
    return cells


@lru_cache(maxsize=1)
def _template_rows() -> np.ndarray:
    return templates().reshape(len(templates()), -1).astype(np.int16)


def cell_index(item: Object | None) -> int:
    """Row of `templates()` that draws this cell."""
    return 0 if item is None else 1 + OBJECTS.index(item)


def render(scene: Scene) -> np.ndarray:
    """uint8 [IMAGE_SIZE, IMAGE_SIZE, 3] picture of a scene."""
    if len(scene) != GRID * GRID:
        raise ValueError(f"a scene has {GRID * GRID} cells, not {len(scene)}")
    cells = templates()[[cell_index(item) for item in scene]]
    return cells.reshape(GRID, GRID, CELL, CELL, 3).transpose(0, 2, 1, 3, 4).reshape(IMAGE_SIZE, IMAGE_SIZE, 3)


def detect(image: np.ndarray) -> list[Detection]:
    """Objects in a uint8 [IMAGE_SIZE, IMAGE_SIZE, 3] picture, in reading order.

    Every cell is compared with every template; an empty cell, or one that resembles nothing closer than
    MAX_DISTANCE, yields no detection.
    """
    if image.shape != (IMAGE_SIZE, IMAGE_SIZE, 3) or image.dtype != np.uint8:
        raise ValueError(f"expected uint8 {IMAGE_SIZE}x{IMAGE_SIZE}x3, got {image.dtype} {image.shape}")
    cells = image.reshape(GRID, CELL, GRID, CELL, 3).transpose(0, 2, 1, 3, 4).reshape(GRID * GRID, 1, -1)
    distances = abs(cells.astype(np.int16) - _template_rows()[None]).mean(-1)
    found = []
    for i, row in enumerate(distances):
        best = int(row.argmin())
        if best and row[best] <= MAX_DISTANCE:
            item = OBJECTS[best - 1]
            found.append(Detection(item.shape, item.color, i // GRID, i % GRID))
    return found


_RELATIONS = {
    "left of": lambda a, b: a.column < b.column,
    "right of": lambda a, b: a.column > b.column,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}
RELATIONS = tuple(_RELATIONS)


def related(subject: Detection, relation: str, other: Detection) -> bool:
    """Whether `subject` stands in `relation` to `other` (by cell; a diagonal neighbour is left and above)."""
    return _RELATIONS[relation](subject, other)


def matches(detections: list[Detection], metadata: dict) -> list[list[Detection]]:
    """The objects of each `include` clause of GenEval's metadata: those of its class, and of its colour and position.

    A position is relative to the objects of an earlier clause.
    """
    matched: list[list[Detection]] = []
    for clause in metadata["include"]:
        objects = [d for d in detections if d.shape == clause["class"] and clause.get("color", d.color) == d.color]
        if "position" in clause:
            relation, target = clause["position"]
            objects = [d for d in objects if any(related(d, relation, o) for o in matched[target])]
        matched.append(objects)
    return matched


def satisfies(detections: list[Detection], metadata: dict) -> bool:
    """GenEval's rule on its metadata schema.

    `include` clauses need at least `count` objects; `exclude` clauses forbid `count` or more of a class.
    """
    found = zip(matches(detections, metadata), metadata["include"], strict=True)
    if any(len(objects) < clause["count"] for objects, clause in found):
        return False
    excluded = metadata.get("exclude", ())
    return all(sum(d.shape == clause["class"] for d in detections) < clause["count"] for clause in excluded)


def is_correct(image: np.ndarray, metadata: dict) -> bool:
    """Whether a picture shows what its prompt's GenEval metadata asks for."""
    return satisfies(detect(image), metadata)


def scene_satisfies(scene: Scene, metadata: dict) -> bool:
    """The same rule on a scene that has not been drawn."""
    cells = [Detection(item.shape, item.color, i // GRID, i % GRID) for i, item in enumerate(scene) if item is not None]
    return satisfies(cells, metadata)
