"""What the questions about images earned: arithmetic on the inquiries of an iteration and the state before it.

The state (what questions of the past were like) changes once an iteration, when all of its questions are known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from unified_rl.config import SelfConsistencyConfig
from unified_rl.inquiries import InquiryRecord, InquiryReward
from unified_rl.policy.controllers import RunningMean
from unified_rl.reward.answers import ANSWER_RULES, AnswerRules, SolverAnswer, answer_tokens, read_answer
from unified_rl.reward.fidelity import GENERATION_RULES, GenerationRules
from unified_rl.reward.role_rewards import (
    PROPOSER_RULES,
    SOLVER_RULES,
    ProposerRules,
    QuestionScore,
    SolverRules,
    choose_question,
    score_question,
    solver_rewards,
)
from unified_rl.reward.skips import Skipped, SkipReason
from unified_rl.reward.token_entropy import ENTROPY_RULES, EntropyRules, EntropyWindow, rank_and_push, token_entropy
from unified_rl.reward.votes import (
    AGREEMENT_RULES,
    RUNNING_TARGET,
    AgreementRules,
    Votes,
    agreement_score,
    count_votes,
)

MIN_ANSWERS = 5  # readable ones of a vote, or all of fewer
FAILURES = (SkipReason.BAD_ENTROPY.value, SkipReason.BAD_SIMILARITY.value)  # numbers that are none: something is broken


@dataclass(frozen=True)
class InquiryRules:
    """The rules of a preset, changed as the configuration says.

    Attributes:
        inside_answer: token entropy counts the tokens of the answer, otherwise those of the reply.
        min_majority: of the vote on a question that the Solver learns from.
        max_entropy: nats, token entropy of its greedy answer.
    """

    answers: AnswerRules
    entropy: EntropyRules
    agreement: AgreementRules
    proposer: ProposerRules
    solver: SolverRules
    generation: GenerationRules
    inside_answer: bool
    min_majority: float
    max_entropy: float


def rules_of(settings: SelfConsistencyConfig) -> InquiryRules:
    """The rules of a run."""
    preset, proposer = settings.preset, PROPOSER_RULES[settings.preset]
    if not settings.token_entropy:
        proposer = replace(proposer, entropy_weight=0.0, vote_weight=1.0)
    generation = replace(
        GENERATION_RULES[preset], cycle=settings.cycle_weight, min_share=settings.reference_share,
        min_quality=settings.min_quality,
    )  # fmt: skip
    solver = replace(SOLVER_RULES[preset], read_only=not settings.penalise_unreadable)
    return InquiryRules(
        ANSWER_RULES[preset], ENTROPY_RULES[preset], AGREEMENT_RULES[preset], proposer, solver,
        generation, inside_answer=preset != "self_consistency_release", min_majority=settings.min_majority,
        max_entropy=settings.max_token_entropy if settings.token_entropy else math.inf,
    )  # fmt: skip


def min_answers(asked: int) -> int:
    """How many of the answers to a question must be readable for a vote."""
    return min(MIN_ANSWERS, asked)


@dataclass(frozen=True)
class InquiryState:
    """What is carried from one understanding iteration to the next.

    Attributes:
        window: recent token entropies.
        target: running mean of vote entropies.
    """

    window: EntropyWindow
    target: RunningMean

    @classmethod
    def start(cls) -> InquiryState:
        """Before the first question."""
        return cls(EntropyWindow(), RUNNING_TARGET)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"window": self.window.to_dict(), "target": self.target.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InquiryState:
        """Inverse of `to_dict`; ValueError where it is no state."""
        if set(values) != {"window", "target"}:
            raise ValueError(f"no state of inquiries: {sorted(values)}")
        return cls(EntropyWindow.from_dict(values["window"]), RunningMean.from_dict(values["target"]))

    def after(self, scores: Sequence[QuestionScore | Skipped], rules: InquiryRules) -> InquiryState:
        """After an iteration with these questions, of all images."""
        scored = [s for s in scores if isinstance(s, QuestionScore)]
        _, window = rank_and_push(self.window, [s.token_entropy for s in scored], rules.entropy)
        return InquiryState(window, self.target.updated([s.votes.entropy for s in scored]))


@dataclass(frozen=True)
class _Read:
    """One question as far as it can be judged alone."""

    answers: list[SolverAnswer | Skipped]
    votes: Votes | Skipped
    entropy: float | Skipped
    greedy: str | None


def score_inquiries(
    records: Sequence[InquiryRecord], state: InquiryState, settings: SelfConsistencyConfig
) -> list[InquiryReward]:
    """Rewards of the questions and answers about the images of one shard.

    Args:
        state: before the iteration.
    """
    rules = rules_of(settings)
    read = [[_read(record, k, settings, rules) for k in range(len(record.questions))] for record in records]
    flat = [r for questions in read for r in questions]
    entropies = [r.entropy for r in flat if _judged(r)]
    ranks = iter(rank_and_push(state.window, entropies, rules.entropy)[0])
    target = state.target.value if settings.running_target else None
    return [
        _reward(record, questions, [_score(r, ranks, target, rules) for r in questions], rules)
        for record, questions in zip(records, read, strict=True)
    ]


def question_scores(reward: InquiryReward) -> list[QuestionScore | Skipped]:
    """The scores of a record's questions, for metrics and the state."""
    return [_stored_score(asked) for asked in reward.questions]


def choice_of(reward: InquiryReward) -> int | Skipped:
    """Which question the Solver learns from, or why from none."""
    return reward.chosen if reward.chosen >= 0 else _stored_skip(reward.why_none)


def _stored_skip(text: str) -> Skipped:
    reason, _, detail = text.partition(": ")
    return Skipped(SkipReason(reason), detail)


def _stored_score(asked: dict) -> QuestionScore | Skipped:
    if asked["skipped"]:
        return _stored_skip(asked["skipped"])
    votes = count_votes(asked["answers"], 1)
    numbers = [asked[name] for name in ("token_entropy", "rank", "agreement")]
    return QuestionScore(votes, *numbers, asked["bucket"], asked["reward"])


def _read(record: InquiryRecord, k: int, settings: SelfConsistencyConfig, rules: InquiryRules) -> _Read:
    asked, tagged = record.questions[k], settings.wording == "full"
    if asked["skipped"]:
        skipped = _stored_skip(asked["skipped"])
        return _Read([], skipped, skipped, None)
    answers = [
        read_answer(text, cut, tagged, rules.answers)
        for text, cut in zip(asked["answers"], asked["answers_truncated"], strict=True)
    ]
    votes = count_votes([a.text if isinstance(a, SolverAnswer) else None for a in answers], min_answers(len(answers)))
    greedy = read_answer(asked["greedy"], asked["greedy_truncated"], tagged, rules.answers)
    entropies = record.tensors["greedy_entropies"][k][: int(record.tensors["greedy_lengths"][k])]
    inside = answer_tokens(asked["greedy_pieces"], asked["greedy_truncated"], tagged) if rules.inside_answer else None
    entropy = inside
    if not isinstance(inside, Skipped):
        entropy = token_entropy(entropies, torch.ones_like(entropies), inside, rules.entropy)
    return _Read(answers, votes, entropy, greedy.text if isinstance(greedy, SolverAnswer) else None)


def _judged(read: _Read) -> bool:
    return not isinstance(read.votes, Skipped) and not isinstance(read.entropy, Skipped)


def _score(read: _Read, ranks: Iterator[float], target: float | None, rules: InquiryRules) -> QuestionScore | Skipped:
    if not _judged(read):
        return read.votes if isinstance(read.votes, Skipped) else read.entropy
    agreement = agreement_score(read.votes, rules.agreement, target)
    return score_question(read.votes, read.entropy, next(ranks), agreement, read.greedy, rules.proposer)


def _reward(
    record: InquiryRecord, read: list[_Read], scores: list[QuestionScore | Skipped], rules: InquiryRules
) -> InquiryReward:
    chosen = choose_question(scores, rules.min_majority, rules.max_entropy)
    failed = next((s for s in scores if isinstance(s, Skipped) and s.reason.value in FAILURES), None)
    scored = any(isinstance(s, QuestionScore) for s in scores)
    status = "failed" if failed else "ok" if scored else "skipped"
    rewards: list[float | None] = []
    if not isinstance(chosen, Skipped):
        earned = solver_rewards(read[chosen].answers, scores[chosen].votes, rules.solver)
        rewards = [None if isinstance(r, Skipped) else r for r in earned]
    questions = zip(record.questions, read, scores, strict=True)
    return InquiryReward(
        image_id=record.image_id,
        policy_version=record.policy_version,
        status=status,
        reason=failed.text if failed else "" if scored else next(s.text for s in scores),
        questions=[_described(asked, r, score, rules) for asked, r, score in questions],
        chosen=-1 if isinstance(chosen, Skipped) else chosen,
        why_none=chosen.text if isinstance(chosen, Skipped) else "",
        solver_rewards=rewards,
    )


def _described(asked: dict, read: _Read, score: QuestionScore | Skipped, rules: InquiryRules) -> dict:
    """A question's entry in the record."""
    answers = [a.text if isinstance(a, SolverAnswer) else None for a in read.answers]
    entry = {
        "question": asked["question"], "skipped": "", "reward": None, "answers": answers, "votes": {}, "majority": "",
        "bucket": "", "vote_entropy": None, "token_entropy": None, "rank": None, "agreement": None,
    }  # fmt: skip
    if isinstance(score, Skipped):
        # A reply without a question is what the Proposer did; an answer that cannot be read is not.
        unasked = bool(asked["skipped"]) and score.reason.value not in FAILURES
        return entry | {"skipped": score.text, "reward": rules.proposer.invalid if unasked else None}
    votes = score.votes
    return entry | {
        "reward": score.reward, "votes": dict(votes.counts), "majority": votes.majority, "bucket": score.bucket,
        "vote_entropy": votes.entropy, "token_entropy": score.token_entropy, "rank": score.rank,
        "agreement": score.agreement,
    }  # fmt: skip


def summary_of(rewards: Sequence[InquiryReward]) -> dict:
    """For a shard's mark: images, questions, and the mean reward of each scored image's questions, summed."""
    good = [r for r in rewards if r.status == "ok"]
    means = []
    for reward in good:
        earned = [q["reward"] for q in reward.questions if q["reward"] is not None]
        means.append(math.fsum(earned) / len(earned))
    failures = [{"key": r.key, "reason": r.reason} for r in rewards if r.status == "failed"]
    return {
        "groups": len(rewards), "images": len(rewards), "failed": len(failures),
        "skipped": sum(r.status == "skipped" for r in rewards), "failures": failures,
        "chosen": sum(r.chosen >= 0 for r in rewards),
    } | ({"reward_sum": math.fsum(means)} if good else {})  # fmt: skip
