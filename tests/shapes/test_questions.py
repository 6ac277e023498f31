"""Answers are recomputed from the scene by independent code; no family can be answered without looking."""

import random
from collections import Counter

import pytest

from unified_rl.shapes.prompts import plural
from unified_rl.shapes.questions import COUNT_WORDS, FAMILIES, TABLES, make_questions, true_answer
from unified_rl.shapes.world import Object, detect, render

QUESTIONS = make_questions(0, 400)


def truth(question):
    """The answer by reading the words of the question against the scene."""
    words = question.question.rstrip("?").split()
    cells = [(i // 2, i % 2, item) for i, item in enumerate(question.scene) if item]
    if question.family == "existence":
        return "yes" if any(item.shape == words[-1] for *_, item in cells) else "no"
    if question.family == "color":
        (answer,) = [item.color for *_, item in cells if item.shape == words[-1]]
        return answer
    if question.family == "shape":
        (answer,) = [item.shape for *_, item in cells if item.color == words[-2]]
        return answer
    if question.family == "counting":
        return COUNT_WORDS[sum(item.color == words[2] for *_, item in cells)]
    if question.family == "number":
        return COUNT_WORDS[sum(plural(item.shape) == words[2] for *_, item in cells)]
    if question.family == "relation":
        place = {item.shape: (row, column) for row, column, item in cells}
        (r1, c1), (r2, c2) = place[words[2]], place[words[-1]]
        relation = " ".join(words[3 : words.index("the", 3)])
        true = {"left of": c1 < c2, "right of": c1 > c2, "above": r1 < r2, "below": r1 > r2}[relation]
        return "yes" if true else "no"
    first, second = words[3], words[6]
    more = sum(item.color == first for *_, item in cells) > sum(item.color == second for *_, item in cells)
    return "yes" if more else "no"


@pytest.mark.parametrize("question", QUESTIONS[::7], ids=lambda q: q.family)
def test_answers_are_true(question):
    assert truth(question) == question.answer


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_balanced(family):
    answers = Counter(q.answer for q in QUESTIONS if q.family == family)
    assert max(answers.values()) / 400 < 1.4 / len(answers)


def test_same_seed_same_questions():
    assert make_questions(5, 3) == make_questions(5, 3) != make_questions(6, 3)


def test_plural():
    assert [plural("cross"), plural("ring")] == ["crosses", "rings"]


@pytest.mark.parametrize("kind", TABLES, ids=lambda kind: kind.__name__)
def test_tables_are_true(kind):
    for seed in range(60):
        scene, question, answer = kind(random.Random(seed))
        objects = [item for item in scene if item]
        words = answer.split()
        for name, value in zip(words[::2], words[1::2], strict=True):
            if question == "what color is each shape?":
                assert [item.color for item in objects if item.shape == name] == [value]
            elif question == "what shape is each color?":
                assert [item.shape for item in objects if item.color == name] == [value]
            elif question == "is there each shape?":
                assert (value == "yes") == any(item.shape == name for item in objects)
            else:
                assert COUNT_WORDS.index(value) == sum(item.color == name for item in objects)


def test_the_truth_of_a_question_is_read_off_the_picture():
    for question in QUESTIONS:
        assert true_answer(question.question, detect(render(question.scene))) == (question.family, question.answer)


@pytest.mark.parametrize(
    "question",
    [
        "what color is the circle?",  # two, of different colours
        "what color is the ring?",  # none
        "is the circle left of the square?",  # one is, the other is not
        "is the ring left of the square?",
        "is the circle is the square?",
        "how many circles are there? and squares?",
    ],
)
def test_a_question_that_the_picture_does_not_decide_has_no_truth(question):
    scene = (Object("circle", "red"), Object("square", "blue"), None, Object("circle", "green"))
    assert true_answer(question, detect(render(scene))) is None
