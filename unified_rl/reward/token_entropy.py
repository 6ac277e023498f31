"""Solver Token Entropy: how unsure one greedy answer is, and its rank among recent questions (arXiv 2606.27376).

A vote's entropy is 0 whenever all answers agree, also where they agree on something wrong or shallow. The entropy of
the next-token distribution still tells such questions apart. Its scale depends on the model, so what counts is its rank
among the questions of the recent past.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from unified_rl.policy.controllers import StoredState
from unified_rl.reward.skips import Skipped, SkipReason

REDUCTIONS = ("max", "mean")
COLD_SLOPE, COLD_CENTRE = 1.5, 2.0  # rank without a history: sigmoid(slope (entropy - centre)), centre in nats
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True)
class EntropyRules:
    """How a greedy answer becomes a rank.

    Attributes:
        first_tokens: tokens that count, from the first of the answer on.
        reduce: `max` or `mean` over them.
        push_first: a question's own entropy is in the history when it is ranked, so no rank reaches 1.
        floor: an entropy of at most this has rank 0 and does not enter the history; None for none.
    """

    first_tokens: int = 5
    reduce: str = "max"
    push_first: bool = False
    floor: float | None = None

    def __post_init__(self) -> None:
        if self.reduce not in REDUCTIONS or self.first_tokens < 1:
            raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)} over at least 1 token, not {self}")


# The release also counts from the first token of the reply, which is that of a tag: leave out `inside` for that.
ENTROPY_RULES = {
    "self_consistency": EntropyRules(),
    "self_consistency_release": EntropyRules(push_first=True, floor=1.0e-6),
    "evolmm": EntropyRules(),
}


def token_entropy(
    entropies: torch.Tensor,
    mask: torch.Tensor,
    inside: Sequence[bool] | None = None,
    rules: EntropyRules = ENTROPY_RULES["self_consistency"],
) -> float | Skipped:
    """Entropy of one greedy answer, nats: the largest (or mean) over its first tokens.

    Args:
        entropies: [T] of the next-token distributions over the whole vocabulary, at temperature 1.
        mask: [T], 1 at tokens of the reply, padding behind them.
        inside: for each token of the reply whether it belongs to the answer, as `answers.answer_tokens` gives it; None
            counts the reply from its first token.

    Raises:
        ValueError: `inside` is not as long as the reply.
    """
    kept = entropies[mask > 0].double()
    if inside is not None:
        if len(inside) != len(kept):
            raise ValueError(f"{len(inside)} marks for a reply of {len(kept)} tokens")
        kept = kept[torch.tensor(inside, dtype=torch.bool, device=kept.device)]
    kept = kept[: rules.first_tokens]
    if not len(kept):
        return Skipped(SkipReason.NO_ANSWER_TOKENS)
    value = float(kept.max() if rules.reduce == "max" else kept.mean())
    return value if math.isfinite(value) else Skipped(SkipReason.BAD_ENTROPY, f"the entropy is {value}")


@dataclass(frozen=True)
class EntropyWindow(StoredState):
    """The entropies of the recent past, oldest first.

    It is the same on all ranks: the values of a whole step, of all ranks together, are ranked against the window before
    the step and enter it as one sorted list, so neither their order nor the number of ranks matters.

    Attributes:
        values: at most `size` entropies, nats.
        size: how many are kept.
        warm: how many make a history; before, ranks come from a fixed curve.
    """

    values: tuple[float, ...] = ()
    size: int = 128
    warm: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))  # JSON has lists
        if not 1 <= self.warm <= self.size or len(self.values) > self.size:
            raise ValueError(f"a window of {len(self.values)} values does not fit size {self.size}, warm {self.warm}")
        if not all(map(math.isfinite, self.values)):
            raise ValueError("an entropy of the window is not a finite number")

    def rank(self, entropy: float) -> float:
        """Share of the window below `entropy`, in 0..1; of the fixed curve while the window is not warm."""
        if len(self.values) < self.warm:
            return 1.0 / (1.0 + math.exp(-COLD_SLOPE * (entropy - COLD_CENTRE)))
        return bisect_left(sorted(self.values), entropy) / len(self.values)

    def pushed(self, entropies: Sequence[float]) -> EntropyWindow:
        """After the `entropies` of a step, in any order. The oldest leave.

        Raises:
            ValueError: an entropy that is not finite.
        """
        return replace(self, values=(*self.values, *_spread(sorted(entropies)))[-self.size :])


def rank_and_push(
    window: EntropyWindow, entropies: Sequence[float], rules: EntropyRules = ENTROPY_RULES["self_consistency"]
) -> tuple[list[float], EntropyWindow]:
    """Ranks of a step's entropies, in 0..1 and in their order, and the window after them.

    Args:
        entropies: of all ranks, each finite; failed ones are left out before.
    """
    counted = [e for e in entropies if rules.floor is None or e > rules.floor]
    after = window.pushed(counted)
    against = after if rules.push_first else window
    ranks = [0.0 if rules.floor is not None and e <= rules.floor else against.rank(e) for e in entropies]
    return ranks, after


def _spread(ordered: Sequence[float]) -> list[float]:
    """The same values so that any stretch of them holds low and high ones.

    The window cuts a step's values anywhere when it drops the oldest; in rising order it would drop the lowest first.
    """
    return [ordered[i] for i in sorted(range(len(ordered)), key=lambda i: (i * GOLDEN) % 1.0)]
