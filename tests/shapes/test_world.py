"""The renderer and the detector agree exactly; GenEval's rule by hand-made cases."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_rl.shapes import world
from unified_rl.shapes.world import OBJECTS, Object, detect, is_correct, render

cells = st.lists(st.one_of(st.none(), st.sampled_from(OBJECTS)), min_size=4, max_size=4).map(tuple)


def seen(image):
    return {(d.row, d.column): Object(d.shape, d.color) for d in detect(image)}


@settings(max_examples=300, deadline=None)
@given(scene=cells)
def test_every_rendered_scene_is_read_back_exactly(scene):
    expected = {(i // 2, i % 2): item for i, item in enumerate(scene) if item}
    assert seen(render(scene)) == expected


@settings(max_examples=100, deadline=None)
@given(scene=cells, seed=st.integers(0, 10**6))
def test_small_noise_does_not_change_what_is_read(scene, seed):
    noise = np.random.default_rng(seed).normal(0, 4, (32, 32, 3))
    noisy = (render(scene) + noise).clip(0, 255).round().astype(np.uint8)
    assert seen(noisy) == seen(render(scene))


def test_templates_are_apart():
    rows = world.templates().reshape(37, -1).astype(float)
    distance = abs(rows[:, None] - rows[None]).mean(-1) + np.eye(37) * 1e9
    assert distance.min() > 5
    assert distance[0].min() > 24


def test_what_resembles_nothing_is_no_object():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert detect(noise) == []


def test_half_an_object_is_no_object():
    image = render((Object("square", "red"), None, None, None)).copy()
    image[8:16] = world.BACKGROUND
    assert detect(image) == []


@pytest.mark.parametrize("shape", [(32, 32), (16, 16, 3), (32, 32, 4)])
def test_wrong_picture_size_is_refused(shape):
    with pytest.raises(ValueError, match="expected uint8 32x32x3"):
        detect(np.zeros(shape, np.uint8))


RED_CIRCLE, BLUE_SQUARE, RED_SQUARE = Object("circle", "red"), Object("square", "blue"), Object("square", "red")


@pytest.mark.parametrize(
    ("scene", "metadata", "expected"),
    [
        ((RED_CIRCLE, None, None, None), {"include": [{"class": "circle", "count": 1}]}, True),
        ((RED_CIRCLE, None, None, None), {"include": [{"class": "square", "count": 1}]}, False),
        ((RED_CIRCLE, None, None, None), {"include": [{"class": "circle", "count": 1, "color": "blue"}]}, False),
        ((RED_CIRCLE, RED_CIRCLE, None, None), {"include": [{"class": "circle", "count": 2}]}, True),
        (
            (RED_CIRCLE,) * 3 + (None,),
            {"include": [{"class": "circle", "count": 2}], "exclude": [{"class": "circle", "count": 3}]},
            False,
        ),
        (
            (RED_CIRCLE, BLUE_SQUARE, None, None),
            {
                "include": [
                    {"class": "square", "count": 1},
                    {"class": "circle", "count": 1, "position": ["left of", 0]},
                ]
            },
            True,
        ),
        (
            (RED_CIRCLE, BLUE_SQUARE, None, None),
            {"include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["above", 0]}]},
            False,
        ),
        (
            (RED_SQUARE, None, None, RED_CIRCLE),
            {"include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1, "position": ["below", 0]}]},
            True,
        ),
    ],
)
def test_geneval_rule(scene, metadata, expected):
    assert is_correct(render(scene), metadata) is expected


def test_wrong_number_of_cells_is_refused():
    with pytest.raises(ValueError, match="4 cells"):
        render((None,) * (random.Random(0).randint(0, 1) + 2))
