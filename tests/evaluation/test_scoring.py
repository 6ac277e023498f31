"""Scores and paired intervals, against numbers computed by hand."""

import numpy as np
import pytest

from unified_rl.evaluation.intervals import mean_interval
from unified_rl.evaluation.scoring import (
    EvaluationError,
    check_complete,
    compare_scores,
    drawing_scores,
    understanding_scores,
)


def outcome(category, correct, rewards):
    return {"category": category, "text": "x", "correct": correct, "rewards": rewards}


def scores(prompts, answers=None):
    return {
        "prompts": prompts, "answers": answers or {}, "prompts_sha256": "a", "sampling": {"seed": 1},
    }  # fmt: skip


def test_overall_is_the_mean_of_category_means():
    prompts = {
        "a": outcome("colors", [True, False], [0.1, 0.2]),
        "b": outcome("colors", [False, False], [0.3, 0.4]),
        "c": outcome("position", [True, True], [0.5, 0.9]),
    }
    result = drawing_scores(prompts)
    assert result["colors"] == 0.25
    assert result["position"] == 1.0
    assert result["overall"] == pytest.approx(0.625)  # the mean over images would be 0.5
    assert result["reward_mean"] == pytest.approx(0.4)
    # The judge keeps the second image of a (wrong), of b (wrong) and of c (right).
    assert result["best_of_g"] == pytest.approx(0.5)


def test_best_of_g_takes_the_first_of_equals():
    assert drawing_scores({"a": outcome("colors", [True, False], [0.5, 0.5])})["best_of_g"] == 1.0


def test_without_a_detector_only_the_reward_is_reported():
    assert drawing_scores({"a": {"text": "x", "rewards": [0.25, 0.75]}}) == {"reward_mean": 0.5}


def test_question_answering_is_the_mean_over_families():
    result = understanding_scores(
        {
            "caption_ranking": [True, True, False, True],
            "question_answering/color": [True],
            "question_answering/shape": [False, True],
        }
    )
    assert result["caption_ranking"] == 0.75
    assert result["question_answering"] == 0.75


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"a": outcome("c", [True] * 2, [0.0] * 2)}, "1 of 2 prompts have no images, first: b"),
        ({"a": outcome("c", [True] * 2, [0.0] * 2), "b": outcome("c", [True], [0.0] * 2)}, "b has 1 of 2 correct"),
        ({"a": outcome("c", [True] * 2, [0.0] * 2), "b": outcome("c", [True] * 2, [0.0])}, "b has 1 of 2 rewards"),
    ],
)
def test_a_short_image_set_is_an_error(prompts, message):
    with pytest.raises(EvaluationError, match=message):
        check_complete(prompts, ["a", "b"], 2)


def test_an_unknown_prompt_is_an_error():
    with pytest.raises(EvaluationError, match="prompt c"):
        check_complete({"c": outcome("c", [True], [0.0])}, [], 1)


def made(generator, n, p):
    return {
        f"p{i}": outcome(("colors", "position")[i % 2], (generator.random(4) < p).tolist(), [0.5] * 4) for i in range(n)
    }


def test_differences_and_their_intervals():
    generator = np.random.default_rng(0)
    base, tuned = scores(made(generator, 400, 0.3)), scores(made(generator, 400, 0.5))
    rows = {r.name: r for r in compare_scores(base, tuned, 2000, 7)}
    overall = rows["overall"]
    assert overall.change == pytest.approx(overall.tuned - overall.base)
    assert overall.base == pytest.approx(drawing_scores(base["prompts"])["overall"])
    # Analytic: the sum of two binomial variances over 1,600 images each.
    half = 1.96 * np.sqrt((0.3 * 0.7 + 0.5 * 0.5) / 1600)
    assert overall.high - overall.low == pytest.approx(2 * half, rel=0.12)
    assert overall.low < overall.change < overall.high
    low, high = overall.base_interval
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.3 * 0.7 / 1600), rel=0.12)
    assert low < overall.base < high
    assert compare_scores(base, tuned, 2000, 7) == compare_scores(base, tuned, 2000, 7)


def test_pairing_removes_what_prompts_share():
    """Every prompt gains exactly one image: prompts differ widely, the difference does not."""
    base = {f"p{i}": outcome("colors", [j < i % 4 for j in range(4)], [0.5] * 4) for i in range(40)}
    tuned = {f"p{i}": outcome("colors", [j <= i % 4 for j in range(4)], [0.5] * 4) for i in range(40)}
    row = compare_scores(scores(base), scores(tuned), 500, 0)[0]
    assert (row.change, row.low, row.high) == pytest.approx((0.25, 0.25, 0.25))


def test_questions_are_compared_too():
    prompts = {"a": outcome("colors", [True], [0.5])}
    base = scores(prompts, {"caption_ranking": [True, False], "question_answering/color": [False, False]})
    tuned = scores(prompts, {"caption_ranking": [True, True], "question_answering/color": [True, False]})
    rows = {r.name: r.change for r in compare_scores(base, tuned, 100, 0)}
    assert rows["caption_ranking"] == rows["question_answering"] == rows["question_answering/color"] == 0.5


@pytest.mark.parametrize("name", ["prompts_sha256", "sampling"])
def test_other_prompts_or_seeds_cannot_be_compared(name):
    base = scores({"a": outcome("colors", [True], [0.5])})
    with pytest.raises(EvaluationError, match=name):
        compare_scores(base, {**base, name: "other"}, 10, 0)


def test_t_interval():
    result = mean_interval([0.1, 0.2, 0.3])
    assert result["mean"] == pytest.approx(0.2)
    # s = 0.1, t(2) = 4.3027, half width = 4.3027 * 0.1 / sqrt(3)
    assert result["high"] - result["mean"] == pytest.approx(0.24841, abs=1e-4)
    assert result["per_seed"] == [0.1, 0.2, 0.3]


def test_one_run_has_no_interval():
    assert mean_interval([0.4]) == {"mean": 0.4, "low": None, "high": None, "per_seed": [0.4]}
