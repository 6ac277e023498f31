"""Rewards of inquiries made by hand: arithmetic, state, and a reason for everything that has no score."""

import json
import math
from dataclasses import replace

import pytest

from tests.made_inquiry import asked, inquiry, unasked
from unified_rl.config import SelfConsistencyConfig
from unified_rl.inquiries import InquiryReward
from unified_rl.policy.controllers import RunningMean
from unified_rl.reward.inquiry import InquiryState, choice_of, question_scores, rules_of, score_inquiries, summary_of
from unified_rl.reward.role_rewards import PROPOSER_RULES
from unified_rl.reward.self_consistency_metrics import choice_metrics, question_metrics
from unified_rl.reward.skips import SkipReason
from unified_rl.reward.token_entropy import EntropyWindow
from unified_rl.reward.votes import AGREEMENT_RULES

BRIEF = SelfConsistencyConfig(wording="brief")
SPLIT = ["red"] * 4 + ["blue"] * 3
WARM = InquiryState(EntropyWindow(tuple(0.1 * i for i in range(10))), RunningMean(0.9))


def score(*records, state=WARM, settings=BRIEF):
    return score_inquiries(records, state, settings)


def test_reward_of_a_question_by_hand():
    (reward,) = score(inquiry("a", asked(answers=SPLIT, entropies=(0.55, 0.9)), asked(answers=["red"] * 7)))
    first, second = reward.questions
    # 4-3: agreement .826 (the specification's table); six of ten entropies lie below .55; the end of turn is no answer.
    assert first["votes"] == {"red": 4, "blue": 3} and first["majority"] == "red" and first["bucket"] == "medium"
    assert first["vote_entropy"] == pytest.approx(0.683, abs=5e-4)
    assert (first["token_entropy"], first["rank"]) == (pytest.approx(0.55), 0.6)
    assert first["agreement"] == pytest.approx(0.826, abs=5e-4)
    assert first["reward"] == pytest.approx(0.7 * 0.6 + 0.3 * first["agreement"])
    assert second["agreement"] == pytest.approx(-0.506, abs=5e-4) and second["bucket"] == "easy"
    # The Solver learns from the question that divides it; informativeness .921 for the majority.
    assert reward.chosen == 0 and reward.status == "ok" and reward.why_none == ""
    assert reward.solver_rewards[0] == pytest.approx((4 / 7) ** 0.7 * 0.921, abs=5e-4)
    assert reward.solver_rewards[6] == pytest.approx(-((3 / 7) ** 0.7) * 0.25 * 0.921, abs=5e-4)


def test_a_reply_that_rambles_earns_what_one_does_that_stands_alone_or_nothing():
    record = inquiry("a", asked(answers=["red"] * 3 + ["", "red"] + ["blue"] * 2, entropies=(0.55, 0.9)))
    (paid,), (unpaid,) = score(record), score(record, settings=replace(BRIEF, penalise_unreadable=False))
    assert paid.questions == unpaid.questions and paid.questions[0]["votes"] == {"red": 4, "blue": 2}
    assert unpaid.solver_rewards == [*paid.solver_rewards[:3], None, *paid.solver_rewards[4:]]
    assert -0.1 < paid.solver_rewards[3] < 0 < paid.solver_rewards[0]
    for reward in (paid, unpaid):
        assert InquiryReward.from_members("a", reward.to_members(), "shard").solver_rewards == reward.solver_rewards


def test_controls_and_presets_change_the_rules():
    record = inquiry("a", asked(answers=SPLIT, entropies=(0.55, 0.95)))
    without = score(record, settings=SelfConsistencyConfig(wording="brief", token_entropy=False))[0].questions[0]
    assert without["reward"] == without["agreement"] and without["rank"] == 0.6
    release = SelfConsistencyConfig(wording="brief", preset="self_consistency_release")
    counted = score(record, settings=release)[0].questions[0]
    assert counted["token_entropy"] == pytest.approx(0.95)  # from the first token of the reply on, whatever it writes
    assert counted["rank"] == 10 / 11  # its own entropy is in the window
    assert rules_of(release).proposer == PROPOSER_RULES["self_consistency_release"]
    assert rules_of(SelfConsistencyConfig(reference_share=0.9)).generation.min_share == 0.9
    assert rules_of(SelfConsistencyConfig(cycle_weight=0.4)).generation.cycle == 0.4
    moved = InquiryState(WARM.window, RunningMean(0.5))
    following = score(record, state=moved, settings=SelfConsistencyConfig(wording="brief", running_target=True))
    fixed = score(record, state=moved)
    gaussians = [
        math.exp(-((following[0].questions[0]["vote_entropy"] - target) ** 2) / (2 * 0.25**2)) for target in (0.5, 0.9)
    ]
    gap = following[0].questions[0]["agreement"] - fixed[0].questions[0]["agreement"]
    assert gap == pytest.approx(AGREEMENT_RULES["self_consistency"].target_weight * (gaussians[0] - gaussians[1]))


def test_the_parent_method_pays_a_question_by_its_vote_and_an_answer_by_its_share():
    settings = SelfConsistencyConfig(wording="brief", preset="evolmm")
    (reward,) = score(inquiry("a", asked(answers=SPLIT, entropies=(0.55, 0.9))), settings=settings)
    gaussian = math.exp(-((0.6829 - 0.90) ** 2) / (2 * 0.35**2))
    assert reward.questions[0]["reward"] == pytest.approx(gaussian, abs=5e-4)
    assert reward.solver_rewards == [pytest.approx((4 / 7) ** 0.7)] * 4 + [pytest.approx((3 / 7) ** 0.7)] * 3


def test_every_question_is_ranked_against_the_window_before_the_iteration():
    entries = [asked(entropies=(e, 0.0)) for e in (5.0, 6.0, 7.0)]
    together = [q["rank"] for q in score(inquiry("a", *entries))[0].questions]
    assert together == [1.0, 1.0, 1.0]
    assert [score(inquiry("a", entry))[0].questions[0]["rank"] for entry in entries] == together


def test_the_state_after_an_iteration_does_not_depend_on_shards_or_order():
    records = [inquiry(f"i{k}", asked(answers=SPLIT, entropies=(0.3 * k, 0.0)), unasked()) for k in range(5)]
    scores = [s for reward in score(*records) for s in question_scores(reward)]
    after = WARM.after(scores, rules_of(BRIEF))
    assert after == WARM.after(scores[::-1], rules_of(BRIEF))
    assert len(after.window.values) == 15 and after.window.values[:10] == WARM.window.values
    assert after.target.value == pytest.approx(0.6 * 0.9 + 0.4 * 0.6829, abs=1e-4)
    assert InquiryState.from_dict(json.loads(json.dumps(after.to_dict()))) == after
    with pytest.raises(ValueError, match="no state"):
        InquiryState.from_dict({"window": {}})


def test_a_reply_without_a_question_costs_and_an_unread_answer_does_not():
    garbled = asked(answers=["red"] * 4 + ["x " * 30] * 3)
    silent = asked(greedy="one two three four five six seven eight nine ten")
    (reward,) = score(inquiry("a", unasked(), garbled, silent))
    assert [q["reward"] for q in reward.questions] == [-1.0, None, None]
    assert [q["skipped"].partition(":")[0] for q in reward.questions] == [
        "no_question", "too_few_answers", "no_answer",
    ]  # fmt: skip
    assert reward.questions[1]["answers"] == ["red"] * 4 + [None] * 3
    assert (reward.status, reward.chosen) == ("skipped", -1)
    assert reward.why_none.startswith("no_question")


def test_questions_that_are_all_easy_teach_the_solver_nothing():
    (reward,) = score(inquiry("a", asked(), asked()))
    assert (reward.status, reward.chosen, reward.solver_rewards) == ("ok", -1, [])
    assert reward.why_none.startswith("too_easy")


def test_votes_below_the_majority_that_is_asked_for_teach_the_solver_nothing():
    record = inquiry("a", asked(answers=SPLIT), asked(answers=["red"] * 5 + ["blue"] * 2))
    assert score(record)[0].chosen == 0
    (reward,) = score(record, settings=SelfConsistencyConfig(wording="brief", min_majority=0.7))
    assert reward.chosen == 1
    (reward,) = score(record, settings=SelfConsistencyConfig(wording="brief", min_majority=0.8))
    assert (reward.chosen, reward.solver_rewards) == (-1, []) and reward.why_none.startswith("too_divided")
    assert [q["reward"] for q in reward.questions] == [q["reward"] for q in score(record)[0].questions]


def test_a_greedy_answer_that_is_unsure_teaches_the_solver_nothing():
    record = inquiry("a", asked(answers=SPLIT, entropies=(0.55, 0.95)), asked(answers=SPLIT, entropies=(0.25, 0.95)))
    assert score(record)[0].chosen == 0
    limited = SelfConsistencyConfig(wording="brief", max_token_entropy=0.3)
    assert score(record, settings=limited)[0].chosen == 1
    (reward,) = score(record, settings=replace(limited, max_token_entropy=0.2))
    assert (reward.chosen, reward.solver_rewards) == (-1, []) and reward.why_none.startswith("too_unsure")
    without = replace(limited, token_entropy=False)  # a control: it looks at no token entropy at all
    assert rules_of(without).max_entropy == math.inf and score(record, settings=without)[0].chosen == 0


def test_why_the_solver_learns_nothing_of_an_image_is_counted():
    settings = SelfConsistencyConfig(wording="brief", min_majority=0.5, max_token_entropy=0.3)
    unsure, sure = asked(answers=SPLIT, entropies=(0.55, 0.95)), asked(answers=SPLIT, entropies=(0.25, 0.95))
    records = [inquiry(f"i{k}", asked(), last) for k, last in enumerate((asked(), asked(), unsure, sure))]
    assert choice_metrics([choice_of(reward) for reward in score(*records, settings=settings)]) == {
        "unlearnt/too_easy": 2.0, "unlearnt/too_unsure": 1.0, "unlearnt/share": 0.75,
    }  # fmt: skip
    assert choice_metrics([]) == {}


@pytest.mark.parametrize("reason", list(SkipReason))
def test_every_reason_is_counted(reason):
    (reward,) = score(inquiry("a", unasked(f"{reason.value}: because"), asked(answers=SPLIT)))
    metrics = question_metrics(question_scores(reward))
    assert metrics[f"skipped/{reason.value}"] == 1.0 and metrics["skipped/share"] == 0.5
    broken = reason in (SkipReason.BAD_ENTROPY, SkipReason.BAD_SIMILARITY)
    assert reward.status == ("failed" if broken else "ok")
    assert reward.questions[0]["reward"] == (None if broken else -1.0)
    summary = summary_of([reward])
    assert summary["failed"] == int(broken) and ("reward_sum" in summary) != broken


def test_summary_of_a_shard():
    rewards = score(
        inquiry("a", asked(answers=SPLIT), unasked()),
        inquiry("b", unasked(), unasked()),
        inquiry("c", asked(), asked()),
    )
    summary = summary_of(rewards)
    counts = ("groups", "images", "failed", "skipped", "chosen")
    assert [summary[name] for name in counts] == [3, 3, 0, 1, 1]
    means = [sum(q["reward"] for q in rewards[i].questions) / 2 for i in (0, 2)]
    assert summary["reward_sum"] == pytest.approx(sum(means))
