"""The judge's exact answers, by hand; and that SRUM's own questions and reader agree with them."""

import random

import numpy as np
import pytest

from unified_rl.reward import srum_parse
from unified_rl.shapes import ratings
from unified_rl.shapes.prompts import metadata_of
from unified_rl.shapes.world import Object, detect, render

RED_CIRCLE, BLUE_CIRCLE, RED_RING = Object("circle", "red"), Object("circle", "blue"), Object("ring", "red")


def scattered(rng):
    return ratings.rate_regions(rng, scattered=True)


@pytest.mark.parametrize(
    "prompt, scene, cells, whole",
    [
        ("a photo of a circle", (None, RED_CIRCLE, None, None), [0.0, 1.0, 0.0, 0.0], 0.95),
        ("a photo of a ring", (None, RED_CIRCLE, None, None), [0.0, -0.9, 0.0, 0.0], -0.9),
        # The prompt is satisfied, but the ring was not asked for.
        ("a photo of a red circle", (RED_CIRCLE, RED_RING, None, None), [1.0, -0.9, 0.0, 0.0], 0.95),
        ("a photo of a red circle", (BLUE_CIRCLE, None, None, None), [-0.5, 0.0, 0.0, 0.0], -0.9),
        ("a photo of a red ring and a blue circle", (RED_RING, RED_CIRCLE, None, None), [1.0, -0.5, 0.0, 0.0], -0.6),
        # One is there but two are asked for: it serves, and of the two clauses only "not three" is satisfied.
        ("a photo of two circles", (None, None, RED_CIRCLE, RED_RING), [0.0, 0.0, 1.0, -0.9], -0.6),
        ("a photo of two circles", (RED_CIRCLE, BLUE_CIRCLE, RED_CIRCLE, None), [-0.5, -0.5, -0.5, 0.0], -0.6),
        ("a photo of a ring above a circle", (RED_RING, None, RED_CIRCLE, None), [1.0, 0.0, 1.0, 0.0], 0.95),
        # The circle is what the ring's place is told by, so only the ring is astray.
        ("a photo of a ring above a circle", (RED_CIRCLE, None, RED_RING, None), [1.0, 0.0, -0.5, 0.0], -0.6),
    ],
)
def test_scores_by_hand(prompt, scene, cells, whole):
    image, metadata = render(scene), metadata_of(prompt)
    assert ratings.cell_scores(image, metadata) == cells
    assert ratings.global_score(image, metadata) == whole


def test_what_is_no_object_counts_against_the_picture():
    image = render((RED_CIRCLE, None, None, None))
    image[:, 16:] = 128
    assert ratings.names_of(image) == ["red circle", "blur", "background", "blur"]
    assert ratings.cell_scores(image, metadata_of("a photo of a circle")) == [1.0, -0.9, 0.0, -0.9]


def test_questions_and_replies_by_hand():
    assert ratings.global_question("a photo of a ring") == 'score the layout for "a photo of a ring"'
    assert ratings.local_question("a photo of a ring", [3, 0]) == (
        'score the regions for "a photo of a ring": 1 (16, 16, 32, 32) 2 (0, 0, 16, 16)'
    )
    reply = ratings.local_reply(["red ring", "background"], [1.0, 0.0])
    assert reply == "Region 1\nObject: red ring\nScore: 1.0\nRegion 2\nObject: background\nScore: 0.0"


def test_srum_reads_what_a_judge_is_taught():
    rng = random.Random(4)
    for make in (ratings.rate_layout, ratings.rate_regions, scattered) * 60:
        made = make(rng)
        if made.cells:
            parsed = srum_parse.parse_regions(made.answer, len(made.cells))
            scores = ratings.cell_scores(made.image, made.metadata)
            assert [parsed[i].score for i in range(1, len(made.cells) + 1)] == [scores[cell] for cell in made.cells]
            names = ratings.names_of(made.image)
            assert [parsed[i].object for i in range(1, len(made.cells) + 1)] == [names[cell] for cell in made.cells]
        else:
            assert srum_parse.parse_global(made.answer).score == ratings.global_score(made.image, made.metadata)


def test_the_mix_holds_every_case():
    rng = random.Random(1)
    made = [make(rng) for make in (ratings.rate_layout, scattered) for _ in range(200)]
    whole = [ratings.global_score(m.image, m.metadata) for m in made if not m.cells]
    assert 0.3 < np.mean(np.array(whole) > 0) < 0.7
    cells = [score for m in made for score in ratings.cell_scores(m.image, m.metadata)]
    assert all(cells.count(score) > 40 for score in (1.0, 0.0, -0.5, -0.9))
    assert {len(m.cells) for m in made} == {0, 1, 2, 3, 4}
    assert any("blur" in ratings.names_of(m.image) for m in made)


def test_a_blurred_cell_is_mostly_no_object():
    rng = random.Random(2)
    seen = []
    for _ in range(100):
        image = render((None, None, None, None))
        image[:16, :16] = ratings.blurred_cell(rng)
        seen.append(len(detect(image)))
    assert np.mean(seen) < 0.5
