import math

import pytest
import torch

from unified_rl.reward.fidelity import (
    GENERATION_RULES,
    FactCheck,
    GenerationRules,
    check_facts,
    cosines,
    cycle_score,
    generation_reward,
    reference_answer,
)
from unified_rl.reward.skips import Skipped, SkipReason
from unified_rl.reward.votes import count_votes

RELEASE = GENERATION_RULES["self_consistency_release"]
FAILED = Skipped(SkipReason.TOO_FEW_ANSWERS)


def test_the_reference_is_what_the_solver_sees_in_the_real_image():
    votes = count_votes(["2"] * 5 + ["3"] * 2)
    assert reference_answer(votes, "Two") == "2"
    assert reference_answer(votes, "two cups") == "2"  # inside the Proposer's answer
    assert reference_answer(votes, "three").reason is SkipReason.UNRELIABLE_REFERENCE
    assert reference_answer(FAILED, "two") is FAILED


def test_a_divided_solver_is_no_reference():
    divided = count_votes(["2"] * 4 + ["3"] * 3)
    assert reference_answer(divided, "2").reason is SkipReason.UNRELIABLE_REFERENCE
    assert reference_answer(divided, "2", GenerationRules(min_share=0.5)) == "2"
    assert reference_answer(count_votes(["2", "2", "2", "3", "3"]), "2") == "2"  # .6 is enough


def test_the_release_believes_the_proposer():
    assert reference_answer(FAILED, "Three dogs", RELEASE) == "three dogs"


def test_facts_by_hand():
    answers = [["2", "2", "3", "2", "2"], ["no", "no", "yes", None, None], ["dark green"], ["cat", "dog"]]
    facts = check_facts(answers, ["2", "yes", "green", "10"])
    assert facts.matches == (1.0, 0.0, 0.8, 0.0)
    scores = [0.7 + 0.3 * 0.8, 0.3 * 2 / 3, 0.7 * 0.8 + 0.3, 0.3 * 0.5]
    assert facts.score == pytest.approx(sum(scores) / 4) and facts.contradiction == 0.25


def test_a_question_without_readable_answers_fails_the_image():
    assert check_facts([["2"], [None, None]], ["2", "3"]).reason is SkipReason.TOO_FEW_ANSWERS
    for arguments in (([], []), ([["2"]], ["2", "3"])):
        with pytest.raises(ValueError, match="for . references"):
            check_facts(*arguments)


def test_wrong_drawings_earn_less():
    """References of one drawing, answers of another: matched pairs come out above shuffled ones."""
    facts = [["2", "red", "yes"], ["3", "blue", "no"], ["1", "green", "yes"]]
    matched = [check_facts([[a] for a in drawn], drawn).score for drawn in facts]
    others = facts[1:] + facts[:1]
    shuffled = [check_facts([[a] for a in drawn], other).score for drawn, other in zip(facts, others, strict=True)]
    assert min(matched) == 1.0 and max(shuffled) < 0.6


def test_cosines():
    first = torch.tensor([[1.0, 0.0], [3.0, 4.0], [1.0, 1.0], [0.0, 0.0], [math.nan, 1.0]])
    second = torch.tensor([[1.0, 0.0], [4.0, 3.0], [-2.0, -2.0], [1.0, 0.0], [1.0, 1.0]])
    values = cosines(first, second)
    assert values[:3] == [1.0, pytest.approx(0.96), pytest.approx(-1.0)]
    assert [v.reason for v in values[3:]] == [SkipReason.BAD_SIMILARITY] * 2
    with pytest.raises(ValueError, match="share one shape"):
        cosines(first, second[:2])


def test_the_cycle():
    assert cycle_score(0.8, 0.4) == pytest.approx(0.6) and cycle_score(0.8) == 0.8
    assert cycle_score(0.8, 0.4, caption_weight=0.75) == pytest.approx(0.7)
    assert cycle_score(-0.9, 0.1) == 0.0 and cycle_score(1.0, 1.0) == 1.0
    assert cycle_score(0.8, FAILED) is FAILED and cycle_score(FAILED) is FAILED


def test_the_reward_by_hand():
    facts = FactCheck(0.8, 0.25, ())
    ours = generation_reward(facts, 0.5, quality=0.9)
    assert ours == pytest.approx(0.9 * ((0.65 * 0.8 + 0.20 * 0.5) / 0.85 - 0.20 * 0.25))
    theirs = generation_reward(facts, 0.5, 0.9, diversity=1.0, rules=RELEASE)
    assert theirs == pytest.approx(0.9 * ((0.65 * 0.8 + 0.20 * 0.5 + 0.10) / 0.95 - 0.05))


def test_effective_weights_of_the_release():
    def one(fidelity=0.0, cycle=0.0, diversity=0.0):
        return generation_reward(FactCheck(fidelity, 0.0, ()), cycle, 1.0, diversity, RELEASE)

    assert [round(v, 3) for v in (one(1.0), one(cycle=1.0), one(diversity=1.0))] == [0.684, 0.211, 0.105]


@pytest.mark.parametrize("fidelity", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("cycle", [0.0, 1.0])
@pytest.mark.parametrize("contradiction", [0.0, 1.0])
def test_the_reward_is_a_share(fidelity, cycle, contradiction):
    assert 0 <= generation_reward(FactCheck(fidelity, contradiction, ()), cycle, 1.0) <= 1


def test_a_failed_part_is_never_a_number():
    facts = FactCheck(0.8, 0.0, ())
    assert generation_reward(FAILED, 0.5, 1.0) is FAILED and generation_reward(facts, FAILED, 1.0) is FAILED
    assert generation_reward(facts, 0.5, 1.0, FAILED) == generation_reward(facts, 0.5, 1.0)  # not asked for
    assert generation_reward(facts, 0.5, 1.0, FAILED, RELEASE) is FAILED
    only_cycle = GenerationRules(fidelity=0.0, contradiction=0.0)
    assert generation_reward(FAILED, 0.5, 1.0, rules=only_cycle) == 0.5
    assert generation_reward(FAILED, 0.5, 1.0, rules=GenerationRules(fidelity=0.0)) is FAILED


def test_a_part_that_nobody_computed_is_an_error():
    with pytest.raises(ValueError, match="cycle has the weight 0.2 but is None"):
        generation_reward(FactCheck(0.8, 0.0, ()), None, 1.0)
    with pytest.raises(ValueError, match="cycle has the weight 0.2 but is nan"):
        generation_reward(FactCheck(0.8, 0.0, ()), math.nan, 1.0)
    assert generation_reward(FactCheck(0.8, 0.0, ()), None, 1.0, rules=GenerationRules(cycle=0.0)) == pytest.approx(0.8)


def test_a_poor_task_is_skipped():
    assert generation_reward(FactCheck(1.0, 0.0, ()), 1.0, 0.34).reason is SkipReason.LOW_QUALITY
    assert generation_reward(FactCheck(1.0, 0.0, ()), 1.0, 0.35) == 0.35


@pytest.mark.parametrize("weights", [{"cycle": -0.1}, {"fidelity": 0.0, "cycle": 0.0}])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weights must not be negative"):
        GenerationRules(**weights)
