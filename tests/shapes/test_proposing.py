"""What the tiny Proposer is taught: replies that the method reads, and answers that the picture bears out."""

import random

import pytest

from unified_rl.reward.proposals import DrawingTask, parse_drawing_task, parse_questions
from unified_rl.shapes.prompts import all_metadata, metadata_of, plural, scene_for
from unified_rl.shapes.proposing import PAIRS, drawing_task, proposal, stated_facts
from unified_rl.shapes.questions import COUNT_WORDS
from unified_rl.shapes.world import detect, render, satisfies


def answer_from(scene, question):
    """The answer to a question of a drawing task, read from the scene by the words of the question."""
    words = question.rstrip("?").split()
    cells = [(i // 2, i % 2, item) for i, item in enumerate(scene) if item]
    if question.startswith("how many"):
        return COUNT_WORDS[sum(plural(item.shape) == words[2] for *_, item in cells)]
    if question.startswith("what color"):
        (item,) = [item for *_, item in cells if item.shape == words[-1]]
        return item.color
    if question.startswith("what shape"):
        (item,) = [item for *_, item in cells if item.color == words[-2]]
        return item.shape
    if question.startswith("is there"):
        return "yes" if any(item.shape == words[-1] for *_, item in cells) else "no"
    place = {item.shape: (row, column) for row, column, item in cells}
    (r1, c1), (r2, c2) = place[words[2]], place[words[-1]]
    axis = " ".join(words[3 : words.index("the", 3)])
    return "yes" if {"left of": c1 < c2, "right of": c1 > c2, "above": r1 < r2, "below": r1 > r2}[axis] else "no"


def test_proposals_are_read_and_of_the_difficulty_asked_for():
    rng = random.Random(0)
    seen = set()
    for _ in range(200):
        made = proposal(rng)
        (question,) = parse_questions(made.answer)
        assert made.answer == f"Question: {question}"
        hard = question.startswith(("how many", "are there more")) or "the" in question.split()[3:]
        if "hard" in made.question:
            assert hard or question.startswith("is the")
        if "medium" in made.question:
            assert question.startswith(("is there", "what color", "what shape"))
        seen.add(made.question)
    assert seen == {"ask a question", "ask a medium question", "ask a hard question"}


def test_drawing_tasks_are_read_in_full_and_true_of_the_picture():
    rng = random.Random(1)
    for _ in range(300):
        made = drawing_task(rng)
        task = parse_drawing_task(made.answer, PAIRS)
        assert isinstance(task, DrawingTask)
        assert not task.dropped
        assert len(task.pairs) == len({question for question, _ in task.pairs}) == PAIRS
        assert satisfies(detect(render(made.scene)), metadata_of(task.prompt))
        for question, answer in task.pairs:
            assert answer_from(made.scene, question) == answer


@pytest.mark.parametrize("tag", all_metadata())
def test_a_prompts_facts_hold_in_every_picture_of_it(tag):
    rng = random.Random(2)
    for metadata in rng.sample(all_metadata()[tag], 5):
        facts = stated_facts(metadata)
        assert len({question for question, _ in facts}) == len(facts) >= 2
        for _ in range(3):
            scene = scene_for(metadata, rng)
            assert all(answer_from(scene, question) == answer for question, answer in facts)
