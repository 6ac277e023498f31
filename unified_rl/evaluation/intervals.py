"""Student-t intervals of a mean over a few runs."""

from __future__ import annotations

import math

# 97.5 % quantiles of Student's t by degrees of freedom, from 1 on.
T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
)  # fmt: skip


def mean_interval(values: list[float]) -> dict:
    """`{"mean", "low", "high", "per_seed"}` with the 95 % t interval; low and high are None for one value.

    Above 21 values the quantile for 21 is used, which is slightly too wide.
    """
    mean = math.fsum(values) / len(values)
    interval: dict = {"mean": mean, "low": None, "high": None, "per_seed": list(values)}
    if len(values) > 1:
        variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
        half = T_975[min(len(values) - 1, len(T_975)) - 1] * math.sqrt(variance / len(values))
        interval |= {"low": mean - half, "high": mean + half}
    return interval
