"""Optimiser steps on an iteration's samples: who computes what, the loss, its metrics, the guards."""

from __future__ import annotations

import math
import operator
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from unified_rl.config import RunConfig
from unified_rl.runtime import Ranks
from unified_rl.train import zero3
from unified_rl.train.batching import micro_batches
from unified_rl.train.losses import GrpoUpdate, RewardWeightedUpdate
from unified_rl.train.samples import IterationData
from unified_rl.train.text_losses import SolverUpdate, TextUpdate
from unified_rl.train.texts import TEXT_ROLES, TextData
from unified_rl.train.zero3 import TrainError

# Largest |ratio - 1| that arithmetic explains before the first update; beyond it the weights differ.
RATIO_LIMIT = {"float32": 1e-2, "bfloat16": 0.2}


def learning_rate(step: int, config: RunConfig, role: str = "") -> float:
    """Rate of a role's optimiser step number `step` (from 0, over all iterations): linear warm-up, then constant."""
    full = operator.attrgetter(rate_key(role))(config)
    return full * min(1.0, (step + 1) / max(1, config.train.warmup_steps))


def rate_key(role: str) -> str:
    """Configuration key of a role's learning rate."""
    return f"self_consistency.{role}_learning_rate" if role in TEXT_ROLES else "train.learning_rate"


@dataclass
class Updater:
    """Runs optimiser steps; all ranks call every method together, with the same global batch."""

    loss: GrpoUpdate | RewardWeightedUpdate | TextUpdate
    ranks: Ranks
    role: str = ""

    def __post_init__(self) -> None:
        self.engine, self.data = self.loss.engine, self.loss.data
        self.config, self.device = self.loss.config, self.loss.device

    def step(self, groups: Sequence[int], number: int, check_ratio: bool) -> dict[str, float]:
        """One optimiser step on whole groups; returns its metrics.

        Args:
            groups: positions in `data.groups`.
            number: of the optimiser step, from 0 over all iterations.
            check_ratio: whether the weights must still be those that drew the samples; of replayed ones only.

        Raises:
            TrainError: weights and samples do not match, or the loss or gradient is not finite.
        """
        started = time.perf_counter()
        batch = samples_of(self.data, groups)
        sums, worst, worst_sample = self._accumulate(batch, number)
        metrics = dict(zip(self.loss.metrics.values(), (sums / len(batch)).tolist(), strict=True))
        if not isinstance(self.loss, RewardWeightedUpdate):
            metrics["ratio/max_deviation"] = worst
            if check_ratio:
                self._check_ratio(worst, worst_sample)
                metrics["ratio/initial_max_deviation"] = worst
        rate = learning_rate(number, self.config, self.role)
        metrics["grad_norm"] = self.engine.step(rate)
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad or metrics["grad_norm"] < 0:
            raise TrainError(
                f"optimiser step {number + 1}: {', '.join(bad) or 'grad_norm'} is not finite; nothing of this "
                f"iteration was stored. Lower {rate_key(self.role)} in a new run"
            )
        texts = isinstance(self.loss, TextUpdate)
        if texts:
            metrics |= self.loss.after_step(batch, metrics["kl"])
        seconds = time.perf_counter() - started
        return {
            **self._reward_metrics(batch, groups),
            **metrics,
            "lr": rate,
            "time/step_s": seconds,
            f"throughput/{'texts' if texts else 'images'}_per_s": len(batch) / seconds,
            "memory/peak_gib": peak_gib(self.device),
        }

    def _accumulate(self, batch: list[int], number: int) -> tuple[torch.Tensor, float, int]:
        """Gradients of the global batch; sums of the loss's metrics, the worst ratio and its sample."""
        share = micro_batches(batch, self.ranks.rank, self.ranks.world_size, self.config.train.micro_batch)
        sums = torch.zeros(len(self.loss.metrics), dtype=torch.float64, device=self.device)
        worst, worst_sample = 0.0, batch[0]
        for i, micro in enumerate(share):
            weights = torch.tensor(micro.weights, device=self.device)
            loss, values = self.loss(micro.samples, number)
            # A zero weight keeps padding in the graph, so that every rank runs the same backward.
            self.engine.backward((loss * weights).sum() / len(batch), last=i == len(share) - 1)
            rows = torch.stack([values[name] for name in self.loss.metrics]).double()
            sums += torch.where(weights > 0, rows, torch.zeros_like(rows)).sum(dim=1)
            deviation = values.get("ratio_max_deviation", torch.zeros_like(weights))
            deviation = torch.where(weights > 0, deviation, torch.zeros_like(weights))
            top = int(deviation.argmax())
            if not (math.isnan(worst) or deviation[top] <= worst):  # NaN is the worst of all
                worst, worst_sample = float(deviation[top]), micro.samples[top]
        return zero3.reduced_sum(sums), *zero3.largest(worst, worst_sample, self.device)

    def _check_ratio(self, worst: float, sample: int) -> None:
        limit = RATIO_LIMIT[self.config.backbone.dtype]
        if not worst <= limit:
            raise TrainError(
                f"before the first update |ratio - 1| is {worst:.3g} for sample {self.data.samples[sample].key}, above "
                f"{limit}: the training weights are not those that drew the samples. Delete the rollout and reward "
                "stages of this iteration and run them again; if it persists in bfloat16, set "
                "train.old_log_probs=recomputed in a new run"
            )

    def _reward_metrics(self, batch: list[int], groups: Sequence[int]) -> dict[str, float]:
        samples = self.data.samples
        used = [[samples[i].used_reward for i in self.data.groups[g]] for g in groups]
        metrics = {"reward": statistics.fmean(samples[i].reward for i in batch)}
        if len(used[0]) > 1 and not isinstance(self.loss, SolverUpdate):  # whose rewards no group is compared by
            metrics["reward_std"] = statistics.fmean(map(statistics.stdev, used))
            metrics["frac_reward_zero_std"] = self.data.zero_std_share
            metrics["advantage/abs_mean"] = statistics.fmean(abs(samples[i].advantage) for i in batch)
        return metrics


def samples_of(data: IterationData | TextData, groups: Iterable[int]) -> list[int]:
    """Positions in `data.samples` of the samples of whole groups, group after group."""
    return [sample for group in groups for sample in data.groups[group]]


def old_log_probs(
    config: RunConfig,
    data: IterationData | TextData,
    steps: Sequence[Sequence[int]],
    replay: Callable[[list[int]], torch.Tensor],
    ranks: Ranks,
    device: torch.device,
) -> list[torch.Tensor]:
    """Log-probs [S] of every sample under the policy that made it, where `train.old_log_probs` wants them from.

    `recomputed` are those under the engine's weights, in the very micro-batches of the first pass of training, so that
    not even half precision tells the two apart; groups without signal keep those of the rollout.

    Args:
        steps: groups of each optimiser step.
        replay: log-probs [B, S] of samples by a forward of all ranks, S that of the longest one.
    """
    old = [s.old_log_probs for s in data.samples]
    if config.train.old_log_probs == "rollout" or not steps:
        return old
    live = samples_of(data, range(len(data.groups)))
    row = {sample: n for n, sample in enumerate(live)}
    passes = sum(map(len, steps)) // len(data.groups)  # each trains every group once
    first_pass = steps[: len(steps) // passes]
    table = torch.zeros(len(live), max(len(old[i]) for i in live), device=device)
    with torch.no_grad():
        for groups in first_pass:
            batch = samples_of(data, groups)
            for micro in micro_batches(batch, ranks.rank, ranks.world_size, config.train.micro_batch):
                for i, weight, values in zip(micro.samples, micro.weights, replay(micro.samples), strict=True):
                    if weight:
                        table[row[i], : len(old[i])] = values[: len(old[i])]
    table = zero3.reduced_sum(table).cpu()
    for sample, n in row.items():
        old[sample] = table[n, : len(old[sample])]
    return old


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
