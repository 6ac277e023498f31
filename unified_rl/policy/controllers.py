"""Small adaptive numbers of training: running means (baselines, targets) and the coefficient of the divergence.

They are values, not services: an update returns the next state, which a checkpoint stores with `to_dict`. Updates take
all values of a step at once and do not depend on their order, so every rank comes to the same state from the values of
all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self  # in `typing` from Python 3.11 on

MAX_EXPONENT = 50.0  # of the change of a coefficient in one update: exp stays finite whatever the divergence


class StoredState:
    """Base of frozen dataclasses whose fields are a state to be stored as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ValueError: an entry is missing or unknown, or no valid state: a default would silently restart it.
        """
        wrong = sorted({f.name for f in fields(cls)} ^ set(values))
        if wrong:
            raise ValueError(f"state of {cls.__name__} with a missing or unknown entry: {', '.join(wrong)}")
        return cls(**values)


@dataclass(frozen=True)
class RunningMean(StoredState):
    """Exponential moving average, `v <- momentum v + (1 - momentum) x`, held between bounds.

    Attributes:
        value: the mean so far; its first value is a choice, not a measurement.
        momentum: share that stays at an update, 0..1.
        low, high: bounds of the value; None for none.
    """

    value: float = 0.0
    momentum: float = 0.6
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum must lie in 0..1, below 1, not {self.momentum!r}")
        if not math.isfinite(self.value) or self._bounded(self.value) != self.value:
            raise ValueError(f"a running mean of {self.value!r} is not a number in {self.low}..{self.high}")

    def updated(self, values: Sequence[float]) -> RunningMean:
        """After one update with the mean of `values`, in any order; unchanged without values.

        Raises:
            ValueError: a value that is not finite.
        """
        if not values:
            return self
        if not all(map(math.isfinite, values)):
            raise ValueError("a running mean takes finite values only")
        mean = math.fsum(values) / len(values)
        return replace(self, value=self._bounded(self.momentum * self.value + (1.0 - self.momentum) * mean))

    def _bounded(self, value: float) -> float:
        value = value if self.low is None else max(value, self.low)
        return value if self.high is None else min(value, self.high)


@dataclass(frozen=True)
class KlController(StoredState):
    """Coefficient beta of a divergence, steered to a target: `beta <- beta exp(rate (KL - target) / target)`.

    At `KL = target` nothing changes; above it the pull towards the reference grows, below it fades.

    Attributes:
        coefficient: beta now.
        target: divergence per token, nats.
        rate: speed.
        low, high: bounds of beta.
    """

    coefficient: float = 0.01
    target: float = 0.02
    rate: float = 0.10
    low: float = 1.0e-3
    high: float = 1.0e2

    def __post_init__(self) -> None:
        if not (0.0 < self.low <= self.coefficient <= self.high < math.inf):
            raise ValueError(f"the coefficient {self.coefficient!r} must lie in {self.low!r}..{self.high!r}, above 0")
        if not (0.0 < self.target < math.inf and 0.0 <= self.rate < math.inf):
            raise ValueError(f"target {self.target!r} must be above 0 and rate {self.rate!r} not below")

    def updated(self, kl: float) -> KlController:
        """After a step with mean divergence `kl`, nats per token, over all ranks.

        Raises:
            ValueError: a divergence that is not finite.
        """
        if not math.isfinite(kl):
            raise ValueError(f"the divergence is {kl}, not a finite number")
        exponent = self.rate * (kl - self.target) / self.target
        exponent = min(max(exponent, -MAX_EXPONENT), MAX_EXPONENT)
        return replace(self, coefficient=min(max(self.coefficient * math.exp(exponent), self.low), self.high))
