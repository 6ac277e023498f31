import pytest

from unified_rl.reward.answers import CANONICAL_WORDS, read_answer
from unified_rl.reward.proposals import parse_drawing_task, parse_questions
from unified_rl.reward.self_consistency_prompts import (
    DIFFICULTIES,
    FRAMINGS,
    caption_question,
    drawing_task_question,
    proposer_question,
    solver_question,
)
from unified_rl.reward.skips import Skipped
from unified_rl.reward.srum_prompts import WORDINGS


def test_seven_different_framings_of_one_question_that_come_in_turn():
    for wording in WORDINGS:
        asked = [solver_question("What\n is {it}?", i, wording) for i in range(7)]
        assert len(set(asked)) == len(FRAMINGS[wording]) == 7
        assert all(a.endswith("What is {it}?") for a in asked)
        assert asked == [solver_question("What\n is {it}?", i, wording) for i in range(7, 14)]
    assert solver_question("is there a circle?", wording="brief") == "is there a circle?"


def test_full_framings_share_their_rules():
    rules = {solver_question("q", i).split("\n", 1)[1] for i in range(7)}
    assert len(rules) == 1 and "one to five words" in rules.pop() and CANONICAL_WORDS == 5


def test_difficulties():
    plain, medium, hard = proposer_question(), proposer_question("medium"), proposer_question("hard")
    assert DIFFICULTIES["medium"] in medium and DIFFICULTIES["hard"] in hard and len({plain, medium, hard}) == 3
    assert proposer_question(wording="brief") == "ask a question"
    assert proposer_question("hard", "brief") == "ask a hard question"


def test_a_second_attempt_is_told_what_was_wrong():
    asked = drawing_task_question(2, ("a\ncup", "no_answer: to 'why?'"))
    assert "\"a cup\", was turned down (no_answer: to 'why?')" in asked and "2 questions" in asked
    assert "turned down" not in drawing_task_question(2)
    assert drawing_task_question(2, wording="brief") == "write a drawing task with 2 questions"


def test_what_is_asked_for_can_be_read():
    assert (
        "<answer>dark green</answer>" in solver_question("q") and read_answer("<answer>dark green</answer>").canonical
    )
    assert '"Question:"' in proposer_question() and parse_questions("Question: How many cups?") == ["How many cups?"]
    asked = drawing_task_question()
    assert all(f'"{label}:"' in asked for label in ("Prompt", "Question", "Answer"))
    reply = "Prompt: Two red cups.\nQuestion: How many cups?\nAnswer: two\nQuestion: Which color?\nAnswer: red"
    task = parse_drawing_task(reply, 2)
    assert task.prompt == "Two red cups." and task.pairs == (("How many cups?", "two"), ("Which color?", "red"))


def test_a_model_that_only_repeats_the_question_has_said_nothing():
    for wording in WORDINGS:
        for difficulty in (None, *DIFFICULTIES):
            assert isinstance(parse_questions(proposer_question(difficulty, wording))[0], Skipped)
        assert isinstance(parse_drawing_task(drawing_task_question(3, ("a cup", "why"), wording=wording)), Skipped)
    assert isinstance(read_answer(solver_question("What is it?")), Skipped)


def test_captions_are_asked_for_in_a_sentence():
    assert "one short" in caption_question() and caption_question("brief") == "Describe the image in detail."


@pytest.mark.parametrize(
    "call",
    [
        lambda: proposer_question("easy"),
        lambda: proposer_question(wording="Full"),
        lambda: solver_question("q", -1),
        lambda: solver_question("q", 0, "x"),
        lambda: drawing_task_question(0),
        lambda: drawing_task_question(wording="x"),
        lambda: caption_question("x"),
    ],
)
def test_anything_else_is_refused(call):
    with pytest.raises(ValueError, match="must be one of|a number from 0|at least one question"):
        call()
