"""Questions of SRUM's judge about pictures of the world, in their brief wording, with exact answers.

The rule for a region, which is one cell of the grid:

* 1.0: an object that takes part in what the prompt asks for;
* -0.5: of a shape that the prompt asks for, but in another colour or place, or one of too many;
* -0.9: an object that the prompt does not ask for, or something that is no object of the world (`blur`);
* 0.0: nothing (`background`).

For the whole picture: 0.95 when the prompt is satisfied; otherwise from -0.9, no clause of its metadata satisfied, to
-0.3, all of them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unified_rl.reward import srum_prompts
from unified_rl.shapes.prompts import CELLS, metadata_of, random_metadata, random_object, scene_for, wrong_caption
from unified_rl.shapes.world import (
    CELL,
    COLORS,
    GRID,
    IMAGE_SIZE,
    MAX_DISTANCE,
    OBJECTS,
    SHAPES,
    Object,
    Scene,
    detect,
    matches,
    render,
    satisfies,
    templates,
)

BLUR, BACKGROUND = "blur", "background"
SERVES, ASTRAY, UNASKED, EMPTY = 1.0, -0.5, -0.9, 0.0
SATISFIED, WORST, NEARLY = 0.95, -0.9, -0.3
Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels, x2 and y2 just outside


@dataclass(frozen=True)
class Rating:
    """One question to the judge.

    Attributes:
        image: uint8 [H, W, 3].
        cells: that are asked for, in the order of the question; none for a question about the whole picture.
    """

    image: np.ndarray
    metadata: dict
    cells: tuple[int, ...]
    question: str
    answer: str


# ---- answers --------------------------------------------------------------------------------------------------------


def global_question(prompt: str) -> str:
    """SRUM's brief question for one score of the whole picture."""
    return srum_prompts.global_question(prompt, "brief")


def local_question(prompt: str, cells: Sequence[int]) -> str:
    """SRUM's brief question for one score of each cell."""
    boxes = [cell_box(cell) for cell in cells]
    return srum_prompts.local_question(prompt, boxes, IMAGE_SIZE, IMAGE_SIZE, wording="brief")


def global_reply(score: float) -> str:
    """The answer to `global_question`."""
    return f"Score: {score}"


def local_reply(names: Sequence[str], scores: Sequence[float]) -> str:
    """The answer to `local_question`."""
    named = enumerate(zip(names, scores, strict=True), 1)
    return "\n".join(f"Region {i}\nObject: {name}\nScore: {score}" for i, (name, score) in named)


# ---- the rule -------------------------------------------------------------------------------------------------------


def names_of(image: np.ndarray) -> list[str]:
    """What each cell of a uint8 [H, W, 3] picture shows: `red circle`, `background` or `blur`."""
    cells = image.reshape(GRID, CELL, GRID, CELL, 3).transpose(0, 2, 1, 3, 4).reshape(CELLS, CELL, CELL, 3)
    empty = abs(cells.astype(np.int16) - templates()[0]).mean((1, 2, 3)) <= MAX_DISTANCE
    names = [BACKGROUND if is_empty else BLUR for is_empty in empty]
    for found in detect(image):
        names[found.row * GRID + found.column] = f"{found.color} {found.shape}"
    return names


def cell_scores(image: np.ndarray, metadata: dict) -> list[float]:
    """The score of every cell by the rule above."""
    scores = [UNASKED if name == BLUR else EMPTY for name in names_of(image)]
    detections = detect(image)
    serving = [found for clause in matches(detections, metadata) for found in clause]
    asked = {clause["class"] for clause in metadata["include"]}
    for found in detections:
        score = UNASKED if found.shape not in asked else SERVES if found in serving else ASTRAY
        too_many = any(
            found.shape == clause["class"] and sum(d.shape == found.shape for d in detections) >= clause["count"]
            for clause in metadata.get("exclude", ())
        )
        scores[found.row * GRID + found.column] = ASTRAY if too_many else score
    return scores


def global_score(image: np.ndarray, metadata: dict) -> float:
    """The score of the whole picture by the rule above."""
    detections = detect(image)
    if satisfies(detections, metadata):
        return SATISFIED
    enough = [
        len(found) >= clause["count"]
        for found, clause in zip(matches(detections, metadata), metadata["include"], strict=True)
    ]
    enough += [
        sum(d.shape == clause["class"] for d in detections) < clause["count"] for clause in metadata.get("exclude", ())
    ]
    return round(WORST + (NEARLY - WORST) * sum(enough) / len(enough), 1)


def cell_box(cell: int) -> Box:
    """The box of a cell of the grid."""
    x, y = cell % GRID * CELL, cell // GRID * CELL
    return x, y, x + CELL, y + CELL


# ---- pictures to rate -----------------------------------------------------------------------------------------------


def with_mistake(scene: Scene, rng: random.Random) -> Scene:
    """The scene with one mistake that a drawer makes: an object changed, gone, too many or in another place."""
    cells = list(scene)
    full = [i for i, item in enumerate(cells) if item is not None]
    kind = rng.choice(("color", "shape", "object", "gone", "added", "moved"))
    cell, other = rng.choice(full), rng.randrange(CELLS)
    old = cells[cell]
    if kind == "moved":
        cells[cell], cells[other] = cells[other], cells[cell]
    elif kind == "added":
        cells[other] = random_object(rng, rng.choice((old.shape, None)))
    elif kind == "gone":
        cells[cell] = None
    else:
        shape = old.shape if kind == "color" else rng.choice(SHAPES)
        cells[cell] = Object(shape, old.color if kind == "shape" else rng.choice(tuple(COLORS)))
    return tuple(cells)


def blurred_cell(rng: random.Random) -> np.ndarray:
    """uint8 [CELL, CELL, 3] between two objects, or between an object and nothing: blended or in patches."""
    first, second = rng.sample(range(len(templates())), 2)
    if rng.random() < 0.5:  # of one colour, as where a drawer was unsure of the shape only
        color = OBJECTS[max(first, 1) - 1].color
        first, second = (1 + OBJECTS.index(Object(shape, color)) for shape in rng.sample(SHAPES, 2))
    if rng.random() < 0.5:
        weights = np.full((2, 2), rng.uniform(0.3, 0.7))
    else:
        weights = np.array([[rng.choice((0.0, 0.3, 1.0)) for _ in range(2)] for _ in range(2)])
    weights = weights.repeat(CELL // 2, 0).repeat(CELL // 2, 1)[..., None]
    return (weights * templates()[first] + (1 - weights) * templates()[second]).round().astype(np.uint8)


def _with_blur(image: np.ndarray, rng: random.Random) -> np.ndarray:
    image = image.copy()
    x1, y1, x2, y2 = cell_box(rng.randrange(CELLS))
    image[y1:y2, x1:x2] = blurred_cell(rng)
    return image


def picture_for(rng: random.Random) -> tuple[np.ndarray, dict]:
    """A picture and the metadata of a prompt: a true one, or one that a mistake of either has parted from it."""
    metadata = random_metadata(rng)
    scene = scene_for(metadata, rng)
    kind = rng.choices(("true", "mistakes", "word", "other"), (0.35, 0.35, 0.15, 0.15))[0]
    if kind == "word":
        metadata = metadata_of(wrong_caption(metadata, scene, rng))
    elif kind == "other":
        metadata = random_metadata(rng)
    elif kind == "mistakes":
        for _ in range(rng.randint(1, 3)):
            scene = with_mistake(scene, rng) if any(scene) else scene
    image = render(scene)
    return (_with_blur(image, rng) if rng.random() < 0.2 else image), metadata


def rate_layout(rng: random.Random) -> Rating:
    """A random question about a whole picture."""
    image, metadata = picture_for(rng)
    answer = global_reply(global_score(image, metadata))
    return Rating(image, metadata, (), global_question(metadata["prompt"]), answer)


def rate_regions(rng: random.Random, scattered: bool = False) -> Rating:
    """A random question about all cells in order, as SRUM's grid asks, or about some of them in any order."""
    image, metadata = picture_for(rng)
    cells = tuple(rng.sample(range(CELLS), rng.randint(1, CELLS)) if scattered else range(CELLS))
    names, scores = names_of(image), cell_scores(image, metadata)
    answer = local_reply([names[cell] for cell in cells], [scores[cell] for cell in cells])
    question = local_question(metadata["prompt"], cells)
    return Rating(image, metadata, cells, question, answer)
