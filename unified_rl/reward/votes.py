"""Vote of N answers to one question: shares, entropy, and how informative the disagreement is (arXiv 2606.27376).

The question is put in N framings. The answers' vote gives the Solver its pseudo-label and the Proposer a part of its
reward. Entropies are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from unified_rl.policy.controllers import RunningMean
from unified_rl.reward.skips import Skipped, SkipReason

BUCKETS = ("easy", "medium", "hard")


@dataclass(frozen=True)
class Votes:
    """Answers to one question and how they agree.

    Attributes:
        answers: N normalised answers in the order of the framings; None where a reply could not be read, which has no
            vote.
        counts: votes of each distinct answer, in the order in which answers first appear.
    """

    answers: tuple[str | None, ...]
    counts: dict[str, int]

    @property
    def readable(self) -> int:
        """How many answers vote."""
        return sum(self.counts.values())

    @property
    def majority(self) -> str:
        """The answer with most votes; of equals the one that came first."""
        return max(self.counts, key=lambda answer: self.counts[answer])

    @property
    def share(self) -> float:
        """Vote share of the majority, in 0..1."""
        return max(self.counts.values()) / self.readable

    @property
    def margin(self) -> float:
        """Share of the majority minus that of the second answer (0 where there is none)."""
        first, second = sorted([*self.counts.values(), 0], reverse=True)[:2]
        return (first - second) / self.readable

    @property
    def entropy(self) -> float:
        """Of the vote shares, in 0..ln N."""
        return math.fsum(n / self.readable * math.log(self.readable / n) for n in self.counts.values())

    @property
    def unanimous(self) -> bool:
        """Whether all answers are one."""
        return len(self.counts) == 1


def count_votes(answers: Sequence[str | None], min_answers: int = 5) -> Votes | Skipped:
    """The vote of N normalised answers, None where unreadable; skipped with fewer than `min_answers` readable ones."""
    counts: dict[str, int] = {}
    for answer in answers:
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
    readable = sum(counts.values())
    if readable < max(min_answers, 1):
        return Skipped(SkipReason.TOO_FEW_ANSWERS, f"{readable} of {len(answers)} answers can be read")
    return Votes(tuple(answers), counts)


@dataclass(frozen=True)
class AgreementRules:
    """How a vote becomes the agreement score `clip(w_I (2 I - 1) + w_G G, -1, 1)`.

    I is the informativeness, half a Gaussian band of the vote entropy, half a damping by the margin:
    `.5 exp(-(H - centre)^2 / (2 half_width^2)) + .5 max(0, 1 - margin / max_margin)`, and G a Gaussian around a target
    entropy, `exp(-(H - target)^2 / (2 sigma^2))`.

    Attributes:
        low, high: vote entropies between which the band lies.
        max_margin: margin from which on the damping is 0.
        informativeness_weight, target_weight: w_I and w_G.
        target: entropy that G wants, unless a running one is given.
        sigma: width of G.
    """

    low: float = 0.15
    high: float = 1.20
    max_margin: float = 0.90
    informativeness_weight: float = 0.9
    target_weight: float = 0.1
    target: float = 0.90
    sigma: float = 0.25


# self_consistency: the published constants. evolmm: the parent method (arXiv 2511.16672), G alone, in 0..1; a control.
AGREEMENT_RULES = {
    "self_consistency": AgreementRules(),
    "self_consistency_release": AgreementRules(),
    "evolmm": AgreementRules(informativeness_weight=0.0, target_weight=1.0, sigma=0.35),
}

# The paper's text has the target follow the vote entropies; its released settings keep it fixed at the rules' target.
RUNNING_TARGET = RunningMean(0.90, momentum=0.9, low=0.4, high=1.5)


def informativeness(votes: Votes, rules: AgreementRules = AGREEMENT_RULES["self_consistency"]) -> float:
    """I in 0..1: highest for a vote that is neither settled nor scattered."""
    centre, half_width = (rules.low + rules.high) / 2.0, (rules.high - rules.low) / 2.0
    band = math.exp(-((votes.entropy - centre) ** 2) / (2.0 * half_width**2))
    damping = max(0.0, 1.0 - votes.margin / rules.max_margin)
    return min(0.5 * band + 0.5 * damping, 1.0)


def agreement_score(
    votes: Votes, rules: AgreementRules = AGREEMENT_RULES["self_consistency"], target: float | None = None
) -> float:
    """r_sc in -1..1; -.506 where all agree. `target` replaces that of the rules, for a running one."""
    wanted = rules.target if target is None else target
    around = math.exp(-((votes.entropy - wanted) ** 2) / (2.0 * rules.sigma**2))
    informative = rules.informativeness_weight * (2.0 * informativeness(votes, rules) - 1.0)
    return min(max(informative + rules.target_weight * around, -1.0), 1.0)


@dataclass(frozen=True)
class BucketRules:
    """Difficulty of a question from its vote.

    Attributes:
        easy_entropy, easy_share: easy up to this vote entropy, or from this share of the majority on.
        hard_entropy, hard_margin: hard from this entropy on if the margin is at most this; all else is medium.
    """

    easy_entropy: float = 0.15
    easy_share: float = 0.85
    hard_entropy: float = 0.90
    hard_margin: float = 0.35


def bucket_of(votes: Votes, rules: BucketRules | None = None) -> str:
    """One of BUCKETS."""
    rules = rules or BucketRules()
    if votes.entropy <= rules.easy_entropy or votes.share >= rules.easy_share:
        return "easy"
    return "hard" if votes.entropy >= rules.hard_entropy and votes.margin <= rules.hard_margin else "medium"
