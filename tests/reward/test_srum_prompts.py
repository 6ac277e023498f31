import pytest

from unified_rl.reward.srum_parse import JudgeScore, parse_global, parse_regions
from unified_rl.reward.srum_prompts import GLOBAL_BANDS, LOCAL_BANDS, global_question, local_question

BOXES = [(0, 0, 16, 16), (4, 8, 30, 32)]


def test_global_question_holds_prompt_and_bands():
    question = global_question("a cup\nleft of {a} plate")
    assert '"a cup left of {a} plate"' in question and GLOBAL_BANDS in question
    assert "Score: 0.95" in question and "Score: -0.7" in question and "Score: 0.2" in question


def test_local_question_lists_every_region():
    question = local_question("a cup", BOXES, 48, 64)
    assert "Region 1: from (0, 0) to (16, 16)\nRegion 2: from (4, 8) to (30, 32)" in question
    assert "64 pixels wide and 48 pixels high" in question and "all 2 regions" in question and LOCAL_BANDS in question
    assert question.endswith("Reason: <one short sentence>")
    assert "Reason" not in local_question("a cup", BOXES, 48, 64, with_reason=False)


@pytest.mark.parametrize("bands", [GLOBAL_BANDS, LOCAL_BANDS])
def test_bands_are_those_of_the_paper(bands):
    lines = [line[:14].split() for line in bands.splitlines()]
    assert lines == [["1.0"], ["0.5", "to", "0.9"], ["-0.4", "to", "0.4"], ["-0.9", "to", "-0.5"], ["-1.0"]]


def test_the_answers_that_are_asked_for_can_be_read():
    reply = "Region 1\nObject: cup\nScore: 0.5\nReason: fine\nRegion 2\nObject: wall\nScore: 0.1\nReason: harmless"
    assert [r.score for r in parse_regions(reply, 2).values()] == [0.5, 0.1]
    example = "Score: 0.95\nReason: The cup stands to the left of the plate, as the prompt says."
    assert example in global_question("a cup") and parse_global(example).score == 0.95


def test_a_judge_that_only_repeats_the_question_has_given_no_score():
    assert not isinstance(parse_global(global_question("a cup")), JudgeScore)
    results = parse_regions(local_question("a cup", BOXES, 48, 64), 2)
    assert not any(isinstance(r, JudgeScore) for r in results.values())


def test_no_regions_no_question():
    with pytest.raises(ValueError, match="without regions"):
        local_question("a cup", [], 48, 64)
