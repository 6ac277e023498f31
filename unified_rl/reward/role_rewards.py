"""What the Proposer earns for a question and the Solver for its answers (Ask-Solve-Generate, arXiv 2606.27376)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from unified_rl.reward.answers import SolverAnswer
from unified_rl.reward.skips import Skipped, SkipReason
from unified_rl.reward.votes import BucketRules, Votes, bucket_of, informativeness


@dataclass(frozen=True)
class ProposerRules:
    """Reward of a question, `entropy_weight d + vote_weight r`, held in -1..1.

    Attributes:
        entropy_weight: of d, the rank of the Solver's token entropy, 0..1.
        vote_weight: of r, the agreement score, -1..1.
        split_votes_only: a unanimous vote adds nothing instead of its negative score.
        easy_cap: an easy question earns no more than this; None for no cap.
        disputed_cap: in the place of `easy_cap` where the greedy answer is not the majority's.
        invalid: reward of a reply that holds no question. It is what the Proposer did, not a failed score.
    """

    entropy_weight: float = 0.70
    vote_weight: float = 0.30
    split_votes_only: bool = False
    easy_cap: float | None = None
    disputed_cap: float | None = None
    invalid: float = -1.0


# The release caps the very case that token entropy is for. Its hand-written bonuses for the form of a question, which
# outweigh the measured difficulty, are not offered.
PROPOSER_RULES = {
    "self_consistency": ProposerRules(),
    "self_consistency_release": ProposerRules(split_votes_only=True, easy_cap=0.20, disputed_cap=0.45),
    "evolmm": ProposerRules(entropy_weight=0.0, vote_weight=1.0),
}


@dataclass(frozen=True)
class QuestionScore:
    """All that is known of one question after its greedy answer and its vote.

    Attributes:
        votes: the answers under N framings.
        token_entropy: of the greedy answer, nats.
        rank: of that entropy among recent ones, 0..1.
        agreement: the agreement score, -1..1.
        bucket: easy, medium or hard.
        reward: what the Proposer earns.
    """

    votes: Votes
    token_entropy: float
    rank: float
    agreement: float
    bucket: str
    reward: float


def score_question(
    votes: Votes,
    token_entropy: float,
    rank: float,
    agreement: float,
    greedy: str | None = None,
    rules: ProposerRules = PROPOSER_RULES["self_consistency"],
) -> QuestionScore:
    """The Proposer's reward with what it was made of.

    Args:
        greedy: the normalised greedy answer; only the cap of a disputed question asks for it.
    """
    bucket = bucket_of(votes)
    counted = 0.0 if rules.split_votes_only and votes.unanimous else agreement
    reward = rules.entropy_weight * rank + rules.vote_weight * counted
    disputed = greedy is not None and greedy != votes.majority and rules.disputed_cap is not None
    cap = rules.disputed_cap if disputed else rules.easy_cap
    if bucket == "easy" and cap is not None:
        reward = min(reward, cap)
    return QuestionScore(votes, token_entropy, rank, agreement, bucket, min(max(reward, -1.0), 1.0))


def choose_question(
    scores: Sequence[QuestionScore | Skipped], min_majority: float = 0.0, max_entropy: float = math.inf
) -> int | Skipped:
    """Which of an image's questions the Solver learns from: of best reward among those that are not easy.

    Of equal ones the first. Skipped where every question is easy, too divided, too unsure or has no score.

    Args:
        min_majority: share of the vote that the majority must have.
        max_entropy: nats, token entropy of the greedy answer. A split vote then is one of wording, not of knowledge.
    """
    divided = [i for i, s in enumerate(scores) if isinstance(s, QuestionScore) and s.bucket != "easy"]
    united = [i for i in divided if scores[i].votes.share >= min_majority]
    useful = [i for i in united if scores[i].token_entropy <= max_entropy]
    if useful:
        return max(useful, key=lambda i: scores[i].reward)
    if united:
        return Skipped(SkipReason.TOO_UNSURE, f"no greedy answer of {len(united)} has at most {max_entropy:g} nats")
    if divided:
        return Skipped(SkipReason.TOO_DIVIDED, f"no majority of {len(divided)} votes has {min_majority:g}")
    failed = next((s for s in scores if isinstance(s, Skipped)), None)
    if failed is not None and all(isinstance(s, Skipped) for s in scores):
        return failed
    return Skipped(SkipReason.TOO_EASY, f"none of {len(scores)} questions divides the Solver")


@dataclass(frozen=True)
class SolverRules:
    """Reward of an answer, `share^power (1 - length_weight clip((w - free_words) / free_words, 0, 1)) value`.

    `share` is the answer's own share of the vote and w the words before it. With s the vote's informativeness, at least
    `min_scale`, `value` is s for the majority and `-minority_weight s` for others; where nearly all agree (an easy
    vote of margin above `trivial_margin`) the majority loses s and others gain `minority_weight s`; where the largest
    share is at most `unsolvable_share` everyone loses `minority_weight s`. Penalties of form are taken off.

    Attributes:
        by_vote: false for a value of 1 for every answer: the share alone pays, as in the parent method.
        form_penalty: for a reply that is not in the form that was asked for.
        vague_penalty: for an answer that says nothing.
        read_only: an answer that could not be read has no reward. Otherwise it earns what one does that nobody else
            gave, less the penalty of form: unpaid, a framing that makes the Solver ramble would do so ever more.
    """

    by_vote: bool = True
    power: float = 0.7
    minority_weight: float = 0.25
    trivial_margin: float = 0.90
    unsolvable_share: float = 0.20
    min_scale: float = 1.0e-4
    length_weight: float = 0.10
    free_words: int = 6
    form_penalty: float = 0.10
    vague_penalty: float = 0.08
    read_only: bool = False


SOLVER_RULES = {
    "self_consistency": SolverRules(),
    "self_consistency_release": SolverRules(),
    "evolmm": SolverRules(by_vote=False, form_penalty=0.0, vague_penalty=0.0),
}


def solver_rewards(
    answers: Sequence[SolverAnswer | Skipped],
    votes: Votes,
    rules: SolverRules = SOLVER_RULES["self_consistency"],
) -> list[float | Skipped]:
    """Reward of each of N answers; with `read_only` an answer that could not be read keeps its reason.

    Args:
        answers: as they were read, in the order of `votes.answers`.

    Raises:
        ValueError: answers that are not those of the vote.
    """
    texts = tuple(a.text if isinstance(a, SolverAnswer) else None for a in answers)
    if texts != votes.answers:
        raise ValueError("the answers are not those that were counted")
    return [_reward_of(answer, votes, rules) for answer in answers]


def _reward_of(answer: SolverAnswer | Skipped, votes: Votes, rules: SolverRules) -> float | Skipped:
    if isinstance(answer, Skipped):
        return answer if rules.read_only else _reward_of_unread(votes, rules)
    value = _value_of(answer.text, votes, rules) if rules.by_vote else 1.0
    value -= rules.form_penalty * (not answer.canonical) + rules.vague_penalty * answer.is_vague
    excess = (answer.words_before - rules.free_words) / rules.free_words
    length = 1.0 - rules.length_weight * min(max(excess, 0.0), 1.0)
    return (votes.counts[answer.text] / votes.readable) ** rules.power * length * value


def _reward_of_unread(votes: Votes, rules: SolverRules) -> float:
    value = -rules.minority_weight * max(rules.min_scale, informativeness(votes)) if rules.by_vote else 1.0
    return (1 / len(votes.answers)) ** rules.power * (value - rules.form_penalty)


def _value_of(text: str, votes: Votes, rules: SolverRules) -> float:
    scale = max(rules.min_scale, informativeness(votes))
    if votes.entropy < BucketRules.easy_entropy and votes.margin > rules.trivial_margin:
        return -scale if text == votes.majority else rules.minority_weight * scale
    if votes.share <= rules.unsolvable_share:
        return -rules.minority_weight * scale
    return scale if text == votes.majority else -rules.minority_weight * scale
