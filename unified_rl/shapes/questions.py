"""Questions about scenes with exact answers, in three easy and four hard families, answers balanced."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from unified_rl.shapes.prompts import CELLS, plural, random_object
from unified_rl.shapes.world import COLORS, GRID, RELATIONS, SHAPES, Detection, Object, Scene, related

# What stands before a question when the small models are taught.
TAUGHT_FRAMINGS = ("", "look: ", "from the picture: ", "look closely: ", "say what is there: ", "briefly: ", "check: ")
COUNT_WORDS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True)
class Question:
    """One question about one scene; `answer` is a single word."""

    family: str
    scene: Scene
    question: str
    answer: str


def random_scene(rng: random.Random, objects: int) -> Scene:
    """`objects` random objects in random cells."""
    cells = rng.sample(range(CELLS), objects)
    return _scene(cells, [random_object(rng) for _ in cells])


def _place(rng: random.Random, objects: list[Object]) -> Scene:
    return _scene(rng.sample(range(CELLS), len(objects)), objects)


def _scene(cells: Sequence[int], objects: Sequence[Object]) -> Scene:
    of_cell = dict(zip(cells, objects, strict=True))
    return tuple(of_cell.get(cell) for cell in range(CELLS))


def _existence(rng: random.Random) -> tuple[Scene, str, str]:
    shape = rng.choice(SHAPES)
    present = rng.random() < 0.5
    others = [s for s in SHAPES if s != shape]
    objects = [random_object(rng, rng.choice(others)) for _ in range(rng.randint(1, 3))]
    if present:
        objects[0] = random_object(rng, shape)
    return _place(rng, objects), f"is there a {shape}?", "yes" if present else "no"


def _color(rng: random.Random) -> tuple[Scene, str, str]:
    shapes = rng.sample(SHAPES, rng.randint(2, 3))
    objects = [random_object(rng, s) for s in shapes]
    return _place(rng, objects), f"what color is the {shapes[0]}?", objects[0].color


def _shape(rng: random.Random) -> tuple[Scene, str, str]:
    colors = rng.sample(tuple(COLORS), rng.randint(2, 3))
    objects = [random_object(rng, color=c) for c in colors]
    return _place(rng, objects), f"what shape is the {colors[0]} object?", objects[0].shape


def _counting(rng: random.Random) -> tuple[Scene, str, str]:
    color, count = rng.choice(tuple(COLORS)), rng.randint(0, 3)
    others = [c for c in COLORS if c != color]
    distractors = rng.randint(max(1, 3 - count), CELLS - count)
    objects = [random_object(rng, color=color) for _ in range(count)]
    objects += [random_object(rng, color=rng.choice(others)) for _ in range(distractors)]
    return _place(rng, objects), f"how many {color} objects are there?", COUNT_WORDS[count]


def _number(rng: random.Random) -> tuple[Scene, str, str]:
    shape, count = rng.choice(SHAPES), rng.randint(0, CELLS)
    others = [s for s in SHAPES if s != shape]
    objects = [random_object(rng, shape) for _ in range(count)]
    objects += [random_object(rng, rng.choice(others)) for _ in range(rng.randint(max(0, 2 - count), CELLS - count))]
    return _place(rng, objects), f"how many {plural(shape)} are there?", COUNT_WORDS[count]


def _relation(rng: random.Random) -> tuple[Scene, str, str]:
    relation = rng.choice(RELATIONS)
    wanted = rng.random() < 0.5
    while True:
        shapes = rng.sample(SHAPES, 4)
        objects = [random_object(rng, s) for s in shapes]
        cells = rng.sample(range(CELLS), 4)
        subject, other = (Detection("", "", cell // GRID, cell % GRID) for cell in cells[:2])
        # Pairs in one row or column only answer questions about that axis.
        if related(subject, relation, other) == wanted and _apart(subject, other, relation):
            question = f"is the {shapes[0]} {relation} the {shapes[1]}?"
            return _scene(cells, objects), question, "yes" if wanted else "no"


def _apart(subject: Detection, other: Detection, relation: str) -> bool:
    return subject.column != other.column if relation in ("left of", "right of") else subject.row != other.row


def _comparison(rng: random.Random) -> tuple[Scene, str, str]:
    wanted = rng.random() < 0.5
    while True:
        first, second = rng.sample(tuple(COLORS), 2)
        counts = rng.randint(0, 3), rng.randint(0, 3)
        if counts[0] == counts[1] or (counts[0] > counts[1]) != wanted or sum(counts) not in (2, 3, 4):
            continue
        objects = [random_object(rng, color=first) for _ in range(counts[0])]
        objects += [random_object(rng, color=second) for _ in range(counts[1])]
        question = f"are there more {first} objects than {second} objects?"
        return _place(rng, objects), question, "yes" if wanted else "no"


FAMILIES: dict[str, Callable[[random.Random], tuple[Scene, str, str]]] = {
    "existence": _existence,
    "color": _color,
    "shape": _shape,
    "counting": _counting,
    "number": _number,
    "relation": _relation,
    "comparison": _comparison,
}
_ASKED = {
    "existence": r"is there an? (\w+)\?",
    "color": r"what color is the (\w+)\?",
    "shape": r"what shape is the (\w+) object\?",
    "counting": r"how many (\w+) objects are there\?",
    "number": r"how many (\w+) are there\?",
    "relation": rf"is the (\w+) ({'|'.join(RELATIONS)}) the (\w+)\?",
    "comparison": r"are there more (\w+) objects than (\w+) objects\?",
}
EASY = ("existence", "color", "shape")
HARD = ("counting", "number", "relation", "comparison")


def make_question(family: str, rng: random.Random) -> Question:
    """One random question of a family."""
    return Question(family, *FAMILIES[family](rng))


def make_questions(seed: int, per_family: int) -> list[Question]:
    """`per_family` questions of every family, the same for the same seed."""
    return [
        make_question(family, random.Random(f"questions-{seed}-{family}-{i}"))
        for family in FAMILIES
        for i in range(per_family)
    ]


def true_answer(question: str, seen: Sequence[Detection]) -> tuple[str, str] | None:
    """(family, answer) of a question in the words of a family about detected objects, whoever asked it.

    None for other words, and where the picture does not decide: no such object, two different ones, or a relation that
    differs between objects.
    """
    found = ((family, re.fullmatch(pattern, question)) for family, pattern in _ASKED.items())
    family, match = next(((family, match) for family, match in found if match), ("", None))
    if match is None:
        return None
    words = match.groups()
    if family in ("counting", "number"):
        count = sum(words[0] in (item.color, plural(item.shape)) for item in seen)
        return family, COUNT_WORDS[count]
    if family in ("color", "shape"):
        answers = {
            item.color if family == "color" else item.shape for item in seen if words[0] in (item.shape, item.color)
        }
    elif family == "existence":
        answers = {_yes(any(item.shape == words[0] for item in seen))}
    elif family == "relation":
        pairs = [(a, b) for a in seen for b in seen if (a.shape, b.shape) == (words[0], words[2]) and a is not b]
        answers = {_yes(related(a, words[1], b)) for a, b in pairs}
    else:
        first, second = (sum(item.color == color for item in seen) for color in words)
        answers = {_yes(first > second)}
    return (family, answers.pop()) if len(answers) == 1 else None


def _yes(true: bool) -> str:
    return "yes" if true else "no"


# Tables: one question that asks for many facts of a family at once. They teach reading many times faster than single
# questions, because every answer holds several look-ups; evaluation never asks them.


def _color_table(rng: random.Random) -> tuple[Scene, str, str]:
    shapes = rng.sample(SHAPES, rng.randint(2, 4))
    objects = [random_object(rng, s) for s in shapes]
    answer = " ".join(f"{item.shape} {item.color}" for item in objects)
    return _place(rng, objects), "what color is each shape?", answer


def _shape_table(rng: random.Random) -> tuple[Scene, str, str]:
    colors = rng.sample(tuple(COLORS), rng.randint(2, 4))
    objects = [random_object(rng, color=c) for c in colors]
    answer = " ".join(f"{item.color} {item.shape}" for item in objects)
    return _place(rng, objects), "what shape is each color?", answer


def _existence_table(rng: random.Random) -> tuple[Scene, str, str]:
    scene = random_scene(rng, rng.randint(1, CELLS))
    present = {item.shape for item in scene if item}
    asked = rng.sample(SHAPES, len(SHAPES))
    return scene, "is there each shape?", " ".join(f"{s} {'yes' if s in present else 'no'}" for s in asked)


def _counting_table(rng: random.Random) -> tuple[Scene, str, str]:
    palette = rng.sample(tuple(COLORS), 2)
    cells = [random_object(rng, color=rng.choice(palette)) for _ in range(rng.randint(2, CELLS))]
    counts = {c: sum(item.color == c for item in cells) for c in COLORS}
    asked = rng.sample(tuple(COLORS), len(COLORS))
    return _place(rng, cells), "how many of each color?", " ".join(f"{c} {COUNT_WORDS[counts[c]]}" for c in asked)


LOOKUPS = (_color_table, _shape_table)
TABLES = (*LOOKUPS, _existence_table, _counting_table)


def make_table(rng: random.Random, kinds: tuple[Callable[[random.Random], tuple[Scene, str, str]], ...]) -> Question:
    """A random table question of one of the kinds; its family is `table`."""
    return Question("table", *rng.choice(kinds)(rng))
