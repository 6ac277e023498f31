import pytest
import torch

from unified_rl.policy.reward_weighted import reward_weighted_loss
from unified_rl.reward.regions import grid_regions
from unified_rl.reward.reward_map import reward_map
from unified_rl.reward.srum_parse import JudgeScore, parse_global, parse_regions
from unified_rl.reward.srum_prompts import (
    GLOBAL_BANDS,
    LOCAL_BANDS,
    THINK_INSTRUCTION,
    WORDINGS,
    global_question,
    local_question,
)

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


def test_brief_questions_are_one_line():
    assert WORDINGS == ("full", "brief")
    assert global_question("a cup\nleft of {a} plate", "brief") == 'score the layout for "a cup left of {a} plate"'
    wanted = 'score the regions for "a cup": 1 (0, 0, 16, 16) 2 (4, 8, 30, 32)'
    assert local_question("a\n cup", BOXES, 48, 64, wording="brief") == wanted
    assert local_question("a cup", BOXES, 32, 32, with_reason=False, wording="brief") == wanted


def test_full_is_the_wording_unless_told_otherwise():
    assert global_question("a cup") == global_question("a cup", "full") != global_question("a cup", "brief")
    assert local_question("a cup", BOXES, 48, 64) == local_question("a cup", BOXES, 48, 64, wording="full")


@pytest.mark.parametrize("wording", ["Brief", "", "short"])
def test_other_wordings_are_refused(wording):
    with pytest.raises(ValueError, match="wording must be one of full, brief, not"):
        global_question("a cup", wording)
    with pytest.raises(ValueError, match="wording must be one of full, brief, not"):
        local_question("a cup", BOXES, 48, 64, wording=wording)


def test_a_plan_as_the_instruction_asks_for_is_not_read_for_scores():
    assert "<think>" in THINK_INSTRUCTION and "</think>" in THINK_INSTRUCTION
    assert parse_global("<think>perhaps Score: 0.9?</think>\nScore: 0.2") == JudgeScore(0.2)


def test_a_judge_that_only_repeats_the_question_has_given_no_score():
    assert not isinstance(parse_global(global_question("a cup")), JudgeScore)
    results = parse_regions(local_question("a cup", BOXES, 48, 64), 2)
    assert not any(isinstance(r, JudgeScore) for r in results.values())
    assert not isinstance(parse_global(global_question("a cup", "brief")), JudgeScore)
    results = parse_regions(local_question("a cup", BOXES, 48, 64, wording="brief"), 2)
    assert not any(isinstance(r, JudgeScore) for r in results.values())


def test_no_regions_no_question():
    with pytest.raises(ValueError, match="without regions"):
        local_question("a cup", [], 48, 64)


def test_from_regions_to_the_loss():
    """The whole chain without a model, as a stage runs it; the numbers by hand."""
    boxes = [region.box for region in grid_regions(32, 32, 2, 2)]
    assert "Region 4: from (16, 16) to (32, 32)" in local_question("a red circle", boxes, 32, 32)
    reply = "Region 1\nScore: 1.0\n---\nRegion 2\nScore: -1\n---\nRegion 4\nScore: 0.5"
    judged = parse_regions(f"<think>Score: 0.1</think>{reply}", len(boxes))
    whole = parse_global("**Score:** 0.5\n**Reason:** almost")
    scores = [judged[i].score if isinstance(judged[i], JudgeScore) else None for i in range(1, len(boxes) + 1)]
    made = reward_map(boxes, scores, whole.score, (32, 32), (2, 2))
    assert made.weights.tolist() == [0.75, -0.75, 0.0, 0.375]
    losses = torch.ones(1, 4)
    loss, _ = reward_weighted_loss(losses, made.weights[None], torch.ones(1, 4))
    assert loss.item() == pytest.approx((1.25 + 0.0 + 0.5 + 0.875) / 4)
