"""From outcomes of single images to scores, and the paired comparison of two checkpoints. Pure: no model, no disk.

The outcomes of a prompt are `{"category": str, "correct": [bool per image], "rewards": [float per image]}`;
`category` and `correct` are absent for prompts that no exact detector can judge.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from unified_rl.runtime import StageError

Outcomes = dict[str, dict]
GENEVAL_ORDER = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


class EvaluationError(StageError):
    """An evaluation that is incomplete or cannot be compared; the message names what is missing."""


def by_category(prompts: Outcomes) -> dict[str, list[str]]:
    """Category -> prompt ids, GenEval's categories in its order; empty when nothing was judged by a detector."""
    groups: dict[str, list[str]] = defaultdict(list)
    for prompt_id, outcome in prompts.items():
        if "correct" in outcome:
            groups[outcome["category"]].append(prompt_id)
    known = [name for name in GENEVAL_ORDER if name in groups]
    return {name: groups[name] for name in [*known, *sorted(set(groups) - set(known))]}


def check_complete(prompts: Outcomes, expected: list[str], samples: int) -> None:
    """A short image set is an error: a mean over what is there would look like a score.

    Raises:
        EvaluationError: a prompt has no outcome, an unknown prompt has one, or the number of images is wrong.
    """
    missing = [p for p in expected if p not in prompts]
    if missing:
        raise EvaluationError(f"{len(missing)} of {len(expected)} prompts have no images, first: {missing[0]}")
    unknown = sorted(set(prompts) - set(expected))
    if unknown:
        raise EvaluationError(f"images of prompt {unknown[0]}, which is not in the prompt folder")
    for prompt_id, outcome in prompts.items():
        for name in ("correct", "rewards"):
            if name in outcome and len(outcome[name]) != samples:
                raise EvaluationError(f"prompt {prompt_id} has {len(outcome[name])} of {samples} {name}")


def chosen_by_judge(outcome: dict) -> bool:
    """Whether the image with the highest reward (the first of equals) is correct."""
    rewards = outcome["rewards"]
    return bool(outcome["correct"][max(range(len(rewards)), key=rewards.__getitem__)])


def drawing_scores(prompts: Outcomes) -> dict[str, float]:
    """`overall`, one accuracy per category, `best_of_g`, `reward_mean`.

    As in GenEval, `overall` is the mean of the category accuracies, not of the images. `best_of_g` is the same mean
    when the judge keeps one of the G images of each prompt. Without a detector only `reward_mean` is there.
    """
    scores: dict[str, float] = {}
    groups = by_category(prompts)
    if groups:
        accuracy = {c: _mean([x for p in ids for x in prompts[p]["correct"]]) for c, ids in groups.items()}
        best = {c: _mean([chosen_by_judge(prompts[p]) for p in ids]) for c, ids in groups.items()}
        scores = {"overall": _mean(accuracy.values()), **accuracy, "best_of_g": _mean(best.values())}
    return {**scores, "reward_mean": _mean([r for o in prompts.values() for r in o["rewards"]])}


def understanding_scores(answers: dict[str, list[bool]]) -> dict[str, float]:
    """`caption_ranking`, `KIND/FAMILY` and the mean of each KIND over its families, from single outcomes."""
    scores = {name: _mean(outcomes) for name, outcomes in answers.items()}
    kinds = defaultdict(list)
    for name, value in scores.items():
        kind, separator, _ = name.partition("/")
        if separator:
            kinds[kind].append(value)
    return scores | {kind: _mean(values) for kind, values in kinds.items()}


def _mean(values) -> float:
    return float(np.mean(np.asarray(list(values), dtype=np.float64)))


Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """One row of the comparison: two scores, their difference, and 95 % intervals of all three."""

    name: str
    base: float
    tuned: float
    change: float
    low: float
    high: float
    base_interval: Interval
    tuned_interval: Interval


def paired_values(base: dict, tuned: dict) -> dict[str, dict[str, np.ndarray]]:
    """score name -> stratum -> fp64 [2, n] of paired values; the score is the mean of its strata's means.

    `base` and `tuned` are the contents of two scores.json.
    """
    pairs: dict[str, dict[str, np.ndarray]] = {}
    groups = by_category(base["prompts"])
    if groups:
        strata = {c: _pair(base, tuned, ids, lambda o: np.mean(o["correct"])) for c, ids in groups.items()}
        pairs["overall"] = strata
        pairs |= {category: {category: values} for category, values in strata.items()}
        pairs["best_of_g"] = {c: _pair(base, tuned, ids, chosen_by_judge) for c, ids in groups.items()}
    pairs["reward_mean"] = {"": _pair(base, tuned, list(base["prompts"]), lambda o: np.mean(o["rewards"]))}
    answers = {n: np.array([v, tuned["answers"][n]], np.float64) for n, v in base.get("answers", {}).items()}
    if "caption_ranking" in answers:
        pairs["caption_ranking"] = {"": answers["caption_ranking"]}
    for kind in dict.fromkeys(name.partition("/")[0] for name in answers if "/" in name):
        families = {name: values for name, values in answers.items() if name.startswith(f"{kind}/")}
        pairs[kind] = families
        pairs |= {name: {"": values} for name, values in families.items()}
    return pairs


def _pair(base: dict, tuned: dict, ids: list[str], value) -> np.ndarray:
    return np.array([[value(scores["prompts"][i]) for i in ids] for scores in (base, tuned)], np.float64)


def check_comparable(base: dict, tuned: dict) -> None:
    """Both evaluations must use the same prompts, seeds and sampling.

    Raises:
        EvaluationError: naming what differs.
    """
    for name in ("prompts_sha256", "sampling"):
        if base[name] != tuned[name]:
            raise EvaluationError(
                f"the evaluations differ in {name}: {base[name]} and {tuned[name]}; evaluate both again"
            )
    if list(base["prompts"]) != list(tuned["prompts"]) or set(base.get("answers", {})) != set(tuned.get("answers", {})):
        raise EvaluationError("the evaluations are not of the same prompts and questions; evaluate both again")


def compare_scores(base: dict, tuned: dict, resamples: int, seed: int) -> list[Difference]:
    """Scores and differences with bootstrap 95 % intervals.

    Prompts (or questions) are resampled with replacement within their category, base and tuned together, so that what
    they share (the prompt, the seeds) cancels in the difference. Intervals span the 2.5 and 97.5 percentiles.
    """
    check_comparable(base, tuned)
    rows = []
    for name, strata in paired_values(base, tuned).items():
        generator = np.random.default_rng(seed)
        means = [float(np.mean([values[i].mean() for values in strata.values()])) for i in (0, 1)]
        draws = np.mean([_resampled(values, resamples, generator) for values in strata.values()], axis=0)
        low, high = _interval(draws[1] - draws[0])
        rows.append(Difference(name, *means, means[1] - means[0], low, high, _interval(draws[0]), _interval(draws[1])))
    return rows


def _interval(draws: np.ndarray) -> Interval:
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)


def _resampled(pairs: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """fp64 [2, resamples]: means of resamples of the n columns of [2, n]."""
    means = np.empty((2, resamples))
    n = pairs.shape[1]
    block = max(1, 2**20 // n)  # bounds the memory of the index array
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        means[:, start : start + count] = pairs[:, generator.integers(n, size=(count, n))].mean(-1)
    return means
