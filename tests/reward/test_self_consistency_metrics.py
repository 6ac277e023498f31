import pytest

from unified_rl.reward.role_rewards import score_question
from unified_rl.reward.self_consistency_metrics import question_metrics
from unified_rl.reward.skips import Skipped, SkipReason
from unified_rl.reward.votes import agreement_score, count_votes


def question(letters, entropy, rank):
    votes = count_votes([None if c == " " else c for c in letters], min_answers=1)
    return score_question(votes, entropy, rank, agreement_score(votes))


def test_metrics_by_hand():
    scores = [
        question("aaaaaaa", 0.1, 0.0),
        question("aaaabbb", 0.3, 0.5),
        question("aabbcc ", 0.7, 1.0),
        Skipped(SkipReason.CUT_OFF),
        question("aaaaaaa", 0.2, 0.5),
    ]
    metrics = question_metrics(scores)
    assert [metrics[f"votes/{b}"] for b in ("easy", "medium", "hard")] == [0.5, 0.25, 0.25]
    assert metrics["votes/unanimous"] == 0.5 and metrics["votes/unreadable"] == pytest.approx(1 / 28)
    assert metrics["votes/majority_share"] == pytest.approx((1 + 4 / 7 + 1 / 3 + 1) / 4)
    assert metrics["votes/agreement"] == pytest.approx(sum(s.agreement for s in scores if hasattr(s, "votes")) / 4)
    quantiles = [metrics[f"token_entropy/{q}"] for q in ("min", "q25", "median", "q75", "max")]
    assert quantiles == pytest.approx([0.1, 0.175, 0.25, 0.4, 0.7])
    assert metrics["token_entropy/rank"] == 0.5
    assert metrics["skipped/cut_off"] == 1.0 and metrics["skipped/share"] == pytest.approx(0.2)


def test_nothing_is_made_up_where_no_question_has_a_score():
    assert question_metrics([]) == {}
    metrics = question_metrics([Skipped(SkipReason.CUT_OFF), Skipped(SkipReason.NO_QUESTION)])
    assert metrics == {"skipped/cut_off": 1.0, "skipped/no_question": 1.0, "skipped/share": 1.0}


def test_a_single_question_is_all_its_quantiles():
    metrics = question_metrics([question("aaaabbb", 0.3, 0.5)])
    assert {metrics[f"token_entropy/{q}"] for q in ("min", "q25", "median", "q75", "max")} == {0.3}
    assert metrics["questions/reward_std"] == 0.0
    metrics = question_metrics([question("aaaabbb", 0.3, 0.5), question("aaaabbb", 0.7, 0.5)])
    assert metrics["token_entropy/q25"] == pytest.approx(0.4) and metrics["token_entropy/median"] == 0.5
