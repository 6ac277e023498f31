from dataclasses import replace

import pytest

from unified_rl.reward.answers import SolverAnswer
from unified_rl.reward.role_rewards import (
    PROPOSER_RULES,
    SOLVER_RULES,
    choose_question,
    score_question,
    solver_rewards,
)
from unified_rl.reward.skips import Skipped, SkipReason
from unified_rl.reward.votes import agreement_score, count_votes, informativeness

RELEASE = PROPOSER_RULES["self_consistency_release"]


def answered(letters, **changes):
    """One answer for each letter, a space where it could not be read; and their vote."""
    answers = [Skipped(SkipReason.NO_ANSWER) if c == " " else SolverAnswer(c, **changes) for c in letters]
    return answers, count_votes([None if c == " " else c for c in letters], min_answers=1)


def question(letters, rank=0.5, **arguments):
    _, votes = answered(letters)
    return score_question(votes, 1.0, rank, agreement_score(votes), **arguments)


def test_the_proposer_is_paid_for_entropy_and_for_a_divided_vote():
    score = question("aaaabbb", rank=0.6)
    assert score.reward == pytest.approx(0.7 * 0.6 + 0.3 * agreement_score(score.votes))
    assert round(score.reward, 3) == round(0.42 + 0.3 * 0.826, 3) and score.bucket == "medium"


def test_token_entropy_rescues_a_unanimous_question():
    sure, unsure = question("aaaaaaa", rank=0.0), question("aaaaaaa", rank=1.0)
    assert round(sure.reward, 3) == -0.152 and round(unsure.reward, 3) == 0.548


def test_the_release_caps_exactly_that():
    assert question("aaaaaaa", rank=1.0, rules=RELEASE).reward == 0.20
    assert question("aaaaaaa", rank=1.0, greedy="a", rules=RELEASE).reward == 0.20
    assert question("aaaaaaa", rank=1.0, greedy="b", rules=RELEASE).reward == 0.45
    assert question("aaaaaaa", rank=0.1, rules=RELEASE).reward == pytest.approx(0.07)  # the vote adds nothing
    assert question("aaaabbb", rank=1.0, rules=RELEASE).reward == question("aaaabbb", rank=1.0).reward


def test_an_invalid_proposal_earns_less_than_any_question():
    assert PROPOSER_RULES["self_consistency"].invalid < question("aaaaaaa", rank=0.0).reward


def test_the_question_that_the_solver_learns_from():
    scores = [question("aaaaaaa", 1.0), Skipped(SkipReason.CUT_OFF), question("aaaabbb", 0.1), question("aaaabbb", 0.3)]
    assert choose_question(scores) == 3
    assert choose_question([*scores, scores[3]]) == 3  # the first of equals
    assert choose_question(scores[:2]).reason is SkipReason.TOO_EASY
    assert choose_question(scores[1:2]).reason is SkipReason.CUT_OFF
    assert choose_question([]).reason is SkipReason.TOO_EASY


def test_the_solver_may_leave_divided_votes_alone():
    scores = [question("aaaaaaa", 1.0), question("aaaabbb", 0.9), question("aaaaabb", 0.3)]
    assert choose_question(scores) == choose_question(scores, 4 / 7) == 1
    assert choose_question(scores, 0.7) == 2
    assert choose_question(scores, 0.75).reason is SkipReason.TOO_DIVIDED
    assert choose_question(scores[:1], 0.7).reason is SkipReason.TOO_EASY


def test_the_solver_may_leave_alone_what_its_plain_answer_does_not_know():
    scores = [
        replace(question(answers, reward), token_entropy=entropy)
        for answers, reward, entropy in (("aaaabbb", 0.9, 0.7), ("aaaabbb", 0.3, 0.3), ("aaaaabb", 0.2, 0.1))
    ]
    assert choose_question(scores) == choose_question(scores, 0.0, 0.7) == 0
    assert choose_question(scores, 0.0, 0.3) == 1
    assert choose_question(scores, 0.7, 0.3) == choose_question(scores, 0.0, 0.2) == 2
    assert choose_question(scores, 0.0, 0.05).reason is SkipReason.TOO_UNSURE
    assert choose_question(scores, 0.75, 0.3).reason is SkipReason.TOO_DIVIDED


def test_the_majority_is_paid_and_others_pay():
    answers, votes = answered("aaaabbc")
    s = informativeness(votes)
    rewards = solver_rewards(answers, votes)
    shares = [4 / 7, 2 / 7, 1 / 7]
    assert rewards[0] == rewards[3] == pytest.approx(shares[0] ** 0.7 * s)
    assert rewards[4] == rewards[5] == pytest.approx(shares[1] ** 0.7 * -0.25 * s)
    assert rewards[6] == pytest.approx(shares[2] ** 0.7 * -0.25 * s)


def test_agreeing_on_a_trivial_question_costs_a_little():
    answers, votes = answered("aaaaaaa")
    assert solver_rewards(answers, votes) == [pytest.approx(-informativeness(votes))] * 7
    assert round(informativeness(votes), 3) == 0.219


def test_an_unsolvable_question_costs_everyone():
    answers, votes = answered("abcdefg")
    assert solver_rewards(answers, votes) == [pytest.approx((1 / 7) ** 0.7 * -0.25 * informativeness(votes))] * 7
    answers, votes = answered("abcde")  # a share of exactly .20
    assert max(solver_rewards(answers, votes)) < 0


@pytest.mark.parametrize("words, factor", [(0, 1.0), (6, 1.0), (9, 0.95), (12, 0.9), (90, 0.9)])
def test_words_before_the_answer_cost(words, factor):
    plain, votes = answered("aaaaabb")
    wordy, _ = answered("aaaaabb", words_before=words)
    assert solver_rewards(wordy, votes)[0] == pytest.approx(factor * solver_rewards(plain, votes)[0])


def test_form_and_vagueness_cost():
    plain, votes = answered("aaaaabb")
    loose, _ = answered("aaaaabb", canonical=False)
    share = (5 / 7) ** 0.7
    assert solver_rewards(loose, votes)[0] == pytest.approx(solver_rewards(plain, votes)[0] - share * 0.10)
    vague = [SolverAnswer("several")] * 5 + [SolverAnswer("4")] * 2
    counted = count_votes([a.text for a in vague])
    assert solver_rewards(vague, counted)[0] == pytest.approx(share * (informativeness(votes) - 0.08))


@pytest.mark.parametrize("preset", ["self_consistency", "evolmm"])
def test_an_answer_that_could_not_be_read_stands_alone_in_the_wrong_form(preset):
    answers, votes = answered("aa aabb")
    s = informativeness(votes)
    rewards = solver_rewards(answers, votes, SOLVER_RULES[preset])
    value = -0.25 * s - 0.10 if preset == "self_consistency" else 1.0
    assert rewards[2] == pytest.approx((1 / 7) ** 0.7 * value) and rewards[2] < rewards[0]
    assert rewards[0] == pytest.approx((4 / 6) ** 0.7 * (s if preset == "self_consistency" else 1.0))  # of the readable


def test_an_answer_that_could_not_be_read_may_have_no_reward():
    answers, votes = answered("aa aabb")
    rules = SOLVER_RULES["self_consistency"]
    rewards = solver_rewards(answers, votes, replace(rules, read_only=True))
    assert rewards[2] is answers[2]
    assert rewards[:2] + rewards[3:] == solver_rewards(*answered("aaaabb"))


def test_the_parent_method_pays_the_share():
    answers, votes = answered("aaaaabb", canonical=False, words_before=12)
    rewards = solver_rewards(answers, votes, SOLVER_RULES["evolmm"])
    assert rewards[0] == pytest.approx((5 / 7) ** 0.7 * 0.9) and rewards[6] == pytest.approx((2 / 7) ** 0.7 * 0.9)
    vague = [SolverAnswer("several")] * 7
    assert solver_rewards(vague, count_votes(["several"] * 7), SOLVER_RULES["evolmm"]) == [1.0] * 7


def test_answers_of_another_vote_are_refused():
    answers, _ = answered("aab")
    _, votes = answered("aba")
    with pytest.raises(ValueError, match="not those that were counted"):
        solver_rewards(answers, votes)
