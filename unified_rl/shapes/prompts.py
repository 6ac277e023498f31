"""Prompts in GenEval's six categories and metadata schema, scenes that satisfy them, captions with one wrong word."""

from __future__ import annotations

import hashlib
import random
from functools import lru_cache

from unified_rl.records import PromptRecord
from unified_rl.shapes.world import COLORS, GRID, RELATIONS, SHAPES, Object, Scene, scene_satisfies

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBERS = {2: "two", 3: "three", 4: "four"}
CELLS = GRID * GRID
HELD_OUT_SHARE = 0.3  # of the combinations of each category
# Training prompts of a category are repeated or thinned to about this many, so that no category dominates.
TRAIN_PROMPTS = {"single_object": 32, "two_object": 48, "counting": 48, "colors": 48, "position": 80, "color_attr": 80}
HELD_OUT_PROMPTS = 32  # per category; small categories repeat, drawn with other seeds


def plural(shape: str) -> str:
    """`circles`, `crosses`."""
    return shape + ("es" if shape.endswith("s") else "s")


def _two(first: str, second: str) -> dict:
    include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
    return {"include": include, "prompt": f"a photo of a {first} and a {second}"}


def _counting(shape: str, count: int) -> dict:
    return {
        "include": [{"class": shape, "count": count}],
        "exclude": [{"class": shape, "count": count + 1}],
        "prompt": f"a photo of {NUMBERS[count]} {plural(shape)}",
    }


def _colors(shape: str, color: str) -> dict:
    return {"include": [{"class": shape, "count": 1, "color": color}], "prompt": f"a photo of a {color} {shape}"}


def _position(subject: str, relation: str, other: str) -> dict:
    include = [{"class": other, "count": 1}, {"class": subject, "count": 1, "position": [relation, 0]}]
    return {"include": include, "prompt": f"a photo of a {subject} {relation} a {other}"}


def _color_attr(shape: str, color: str, other: str, other_color: str) -> dict:
    include = [{"class": shape, "count": 1, "color": color}, {"class": other, "count": 1, "color": other_color}]
    return {"include": include, "prompt": f"a photo of a {color} {shape} and a {other_color} {other}"}


@lru_cache(maxsize=1)
def all_metadata() -> dict[str, list[dict]]:
    """Every combination of every category, as GenEval metadata with its `tag`."""
    pairs = [(a, b) for a in SHAPES for b in SHAPES if a != b]
    colors = tuple(COLORS)
    made = {
        "single_object": [{"include": [{"class": s, "count": 1}], "prompt": f"a photo of a {s}"} for s in SHAPES],
        "two_object": [_two(a, b) for a, b in pairs],
        "counting": [_counting(s, n) for s in SHAPES for n in NUMBERS],
        "colors": [_colors(s, c) for s in SHAPES for c in colors],
        "position": [_position(a, r, b) for a, b in pairs for r in RELATIONS],
        "color_attr": [_color_attr(a, c, b, d) for a, b in pairs for c in colors for d in colors if c != d],
    }
    return {tag: [{"tag": tag, **m} for m in items] for tag, items in made.items()}


def split_metadata(split: str) -> dict[str, list[dict]]:
    """`train` or `heldout` combinations of each category, in an order fixed by the hash of the prompt."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split {split!r} is neither train nor heldout")
    result = {}
    for tag, items in all_metadata().items():
        ordered = sorted(items, key=lambda m: hashlib.sha256(m["prompt"].encode()).hexdigest())
        cut = max(1, round(HELD_OUT_SHARE * len(ordered)))
        result[tag] = ordered[:cut] if split == "heldout" else ordered[cut:]
    return result


def prompt_records(split: str) -> list[PromptRecord]:
    """Prompt records of a split.

    Both are balanced over the categories (TRAIN_PROMPTS, HELD_OUT_PROMPTS): small categories repeat under new
    ids, large ones are thinned. No combination of `heldout` occurs in `train`.
    """
    records = []
    for tag, items in split_metadata(split).items():
        count = TRAIN_PROMPTS[tag] if split == "train" else HELD_OUT_PROMPTS
        for i in range(count):
            metadata = items[i % len(items)]
            records.append(PromptRecord(f"{tag}-{split}-{i:03d}", metadata["prompt"], metadata))
    return records


def random_object(rng: random.Random, shape: str | None = None, color: str | None = None) -> Object:
    """An object with the open attributes drawn uniformly."""
    return Object(shape or rng.choice(SHAPES), color or rng.choice(tuple(COLORS)))


def scene_for(metadata: dict, rng: random.Random) -> Scene:
    """A random scene with exactly the objects that the prompt names; what it leaves open is drawn uniformly."""
    objects = []
    for clause in metadata["include"]:
        objects += [random_object(rng, clause["class"], clause.get("color")) for _ in range(clause["count"])]
    while True:
        cells: list[Object | None] = [None] * CELLS
        for cell, item in zip(rng.sample(range(CELLS), len(objects)), objects, strict=True):
            cells[cell] = item
        scene = tuple(cells)
        if scene_satisfies(scene, metadata):
            return scene


def random_metadata(rng: random.Random) -> dict:
    """A combination drawn with equal share per category."""
    return rng.choice(all_metadata()[rng.choice(CATEGORIES)])


_NUMBER_WORDS = tuple(NUMBERS.values())
_WORD_CLASSES = (
    SHAPES,
    tuple(plural(s) for s in SHAPES),
    tuple(COLORS),
    _NUMBER_WORDS,
    ("left", "right"),
    ("above", "below"),
)


def wrong_caption(metadata: dict, scene: Scene, rng: random.Random) -> str:
    """The prompt with one word exchanged so that it no longer describes the scene."""
    by_prompt = _metadata_by_prompt()
    words = metadata["prompt"].split()
    choices = []
    for i, word in enumerate(words):
        for group in _WORD_CLASSES:
            if word not in group:
                continue
            for other in group:
                changed = " ".join([*words[:i], other, *words[i + 1 :]])
                known = by_prompt.get(changed)
                if other != word and known is not None and not scene_satisfies(scene, known):
                    choices.append(changed)
    return rng.choice(choices)


def is_prompt(text: str) -> bool:
    """Whether `text` is one of the world's prompts."""
    return text in _metadata_by_prompt()


def metadata_of(prompt: str) -> dict:
    """The metadata of one of the world's prompts."""
    return _metadata_by_prompt()[prompt]


@lru_cache(maxsize=1)
def _metadata_by_prompt() -> dict[str, dict]:
    return {m["prompt"]: m for items in all_metadata().values() for m in items}


def caption_pairs(seed: int, count: int) -> list[tuple[Scene, str, str, str]]:
    """(scene, true caption, caption with one wrong word, category), `count` of them, category by category in turn."""
    rng = random.Random(f"captions-{seed}")
    pairs = []
    for i in range(count):
        metadata = rng.choice(all_metadata()[CATEGORIES[i % len(CATEGORIES)]])
        scene = scene_for(metadata, rng)
        pairs.append((scene, metadata["prompt"], wrong_caption(metadata, scene, rng), metadata["tag"]))
    return pairs
