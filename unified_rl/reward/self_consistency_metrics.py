"""What to log of the questions of a step: difficulty, agreement, token entropy, and why others have no score."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from unified_rl.reward.role_rewards import QuestionScore
from unified_rl.reward.skips import Skipped, count_skips
from unified_rl.reward.votes import BUCKETS


def question_metrics(scores: Sequence[QuestionScore | Skipped]) -> dict[str, float]:
    """Metrics by name. Means and shares are over the questions with a score, and left out where there are none.

    `votes/` has the share of each bucket, of unanimous votes and of unreadable answers, and means of entropy, share of
    the majority and agreement score; `token_entropy/` quantiles in nats and the mean rank; `questions/` the
    Proposer's reward; `skipped/` the number of questions for each reason that occurs, and `skipped/share` of all.
    """
    if not scores:
        return {}
    scored = [s for s in scores if isinstance(s, QuestionScore)]
    skipped = {f"skipped/{name}": float(n) for name, n in count_skips(scores).items() if n}
    skipped["skipped/share"] = 1.0 - len(scored) / len(scores)
    if not scored:
        return skipped
    votes = [s.votes for s in scored]
    entropies = [s.token_entropy for s in scored]
    rewards = [s.reward for s in scored]
    return {
        **{f"votes/{bucket}": sum(s.bucket == bucket for s in scored) / len(scored) for bucket in BUCKETS},
        "votes/unanimous": sum(v.unanimous for v in votes) / len(votes),
        "votes/unreadable": 1.0 - sum(v.readable for v in votes) / sum(len(v.answers) for v in votes),
        "votes/entropy": statistics.fmean(v.entropy for v in votes),
        "votes/majority_share": statistics.fmean(v.share for v in votes),
        "votes/agreement": statistics.fmean(s.agreement for s in scored),
        **{f"token_entropy/{name}": value for name, value in _quantiles(entropies).items()},
        "token_entropy/rank": statistics.fmean(s.rank for s in scored),
        "questions/reward": statistics.fmean(rewards),
        "questions/reward_std": statistics.pstdev(rewards),
        **skipped,
    }


def choice_metrics(choices: Sequence[int | Skipped]) -> dict[str, float]:
    """`unlearnt/REASON` counts the images that have no question for the Solver; `unlearnt/share` is their share."""
    counts = {f"unlearnt/{name}": float(n) for name, n in count_skips(choices).items() if n}
    return {**counts, "unlearnt/share": sum(counts.values()) / len(choices)} if choices else {}


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    quarters = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return dict(zip(("min", "q25", "median", "q75", "max"), (min(values), *quarters, max(values)), strict=True))
