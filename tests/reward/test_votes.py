import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unified_rl.reward.skips import SkipReason
from unified_rl.reward.votes import (
    AGREEMENT_RULES,
    RUNNING_TARGET,
    BucketRules,
    agreement_score,
    bucket_of,
    count_votes,
    informativeness,
)

# votes, entropy, share of the majority, margin, informativeness, agreement score, bucket
TABLE = [
    ((7,), 0.000, 1.000, 1.000, 0.219, -0.506, "easy"),
    ((6, 1), 0.410, 0.857, 0.714, 0.543, 0.093, "easy"),
    ((5, 2), 0.598, 0.714, 0.429, 0.757, 0.510, "medium"),
    ((5, 1, 1), 0.796, 0.714, 0.571, 0.669, 0.397, "medium"),
    ((4, 3), 0.683, 0.571, 0.143, 0.921, 0.826, "medium"),
    ((4, 2, 1), 0.956, 0.571, 0.286, 0.775, 0.592, "hard"),
    ((4, 1, 1, 1), 1.154, 0.571, 0.429, 0.592, 0.225, "medium"),
    ((3, 3, 1), 1.004, 0.429, 0.000, 0.911, 0.831, "hard"),
    ((3, 2, 2), 1.079, 0.429, 0.143, 0.793, 0.604, "hard"),
    ((3, 2, 1, 1), 1.277, 0.429, 0.143, 0.680, 0.356, "hard"),
    ((2, 2, 2, 1), 1.352, 0.286, 0.000, 0.718, 0.412, "hard"),
    ((3, 1, 1, 1, 1), 1.475, 0.429, 0.286, 0.498, 0.003, "hard"),
    ((2, 2, 1, 1, 1), 1.550, 0.286, 0.000, 0.625, 0.228, "hard"),
    ((2, 1, 1, 1, 1, 1), 1.748, 0.286, 0.143, 0.483, -0.031, "hard"),
    ((1, 1, 1, 1, 1, 1, 1), 1.946, 0.143, 0.000, 0.527, 0.048, "hard"),
]


def votes_of(*counts):
    return count_votes([f"answer {i}" for i, n in enumerate(counts) for _ in range(n)], min_answers=1)


@pytest.mark.parametrize("counts, entropy, share, margin, inform, score, bucket", TABLE)
def test_the_table_of_seven_votes(counts, entropy, share, margin, inform, score, bucket):
    votes = votes_of(*counts)
    found = votes.entropy, votes.share, votes.margin, informativeness(votes), agreement_score(votes)
    assert [round(v, 3) for v in found] == [entropy, share, margin, inform, score]
    assert bucket_of(votes) == bucket
    assert votes.unanimous == (counts == (7,))


def test_unanimity_by_hand():
    votes = votes_of(7)
    band = math.exp(-(0.675**2) / (2 * 0.525**2))
    around = math.exp(-(0.9**2) / (2 * 0.25**2))
    assert agreement_score(votes) == pytest.approx(0.9 * (band - 1) + 0.1 * around)
    assert round(agreement_score(votes), 3) == -0.506
    assert agreement_score(votes_of(5)) == agreement_score(votes_of(3)) == agreement_score(votes)


def test_the_parent_method_scores_by_the_target_alone():
    rules = AGREEMENT_RULES["evolmm"]
    votes = votes_of(4, 3)
    assert agreement_score(votes, rules) == pytest.approx(math.exp(-((votes.entropy - 0.9) ** 2) / (2 * 0.35**2)))
    assert agreement_score(votes, rules, target=votes.entropy) == 1.0


def test_a_target_that_follows_the_votes():
    target = RUNNING_TARGET.updated([votes_of(7).entropy, votes_of(4, 3).entropy])
    assert target.value == pytest.approx(0.9 * 0.9 + 0.1 * votes_of(4, 3).entropy / 2)
    votes = votes_of(4, 3)
    around = [math.exp(-((votes.entropy - t) ** 2) / (2 * 0.25**2)) for t in (0.9, target.value)]
    moved = agreement_score(votes, target=target.value) - agreement_score(votes)
    assert moved == pytest.approx(0.1 * (around[1] - around[0]))


def test_of_equal_answers_the_first_is_the_majority():
    assert count_votes(["b", "a", "a", "b", "c"]).majority == "b"
    assert count_votes(["c", "b", "a", "a", "b"]).majority == "b"


def test_unreadable_replies_have_no_vote():
    votes = count_votes(["red", None, "red", "blue", None, "red", "red"])
    assert votes.readable == 5 and votes.share == 0.8 and votes.margin == pytest.approx(0.6)
    assert votes.answers[1] is None and votes.counts == {"red": 4, "blue": 1}


def test_too_few_readable_replies_are_no_vote():
    skipped = count_votes(["red", None, None, "red", "blue", None, "red"])
    assert skipped.reason is SkipReason.TOO_FEW_ANSWERS and skipped.detail == "4 of 7 answers can be read"
    assert count_votes([None, None], min_answers=0).reason is SkipReason.TOO_FEW_ANSWERS
    assert count_votes([]).reason is SkipReason.TOO_FEW_ANSWERS


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=12), st.randoms())
def test_ranges_and_order(answers, random):
    votes = count_votes(answers, min_answers=1)
    assert 0 <= votes.entropy <= math.log(len(answers)) + 1e-12
    assert (votes.entropy == 0) == votes.unanimous and 0 <= votes.margin <= votes.share <= 1
    assert 0 <= informativeness(votes) <= 1 and -1 <= agreement_score(votes) <= 1
    random.shuffle(answers)
    assert agreement_score(count_votes(answers, min_answers=1)) == pytest.approx(agreement_score(votes))


def test_bounds_of_the_buckets():
    assert bucket_of(votes_of(4, 3), BucketRules(easy_entropy=0.7)) == "easy"
    assert bucket_of(votes_of(6, 1), BucketRules(easy_share=0.9)) == "medium"
    assert bucket_of(votes_of(4, 1, 1, 1), BucketRules(hard_margin=0.5)) == "hard"
