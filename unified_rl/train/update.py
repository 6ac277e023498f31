"""Optimiser steps on an iteration's samples: who computes what, the loss, its metrics, the guards."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unified_rl.config import RunConfig
from unified_rl.policy.grpo import grpo_loss
from unified_rl.runtime import Ranks
from unified_rl.train import zero3
from unified_rl.train.batching import MicroBatch, micro_batches
from unified_rl.train.samples import IterationData, Sample
from unified_rl.train.zero3 import TrainError, Zero3Engine

# Largest |ratio - 1| that arithmetic explains before the first update; beyond it the weights differ.
RATIO_LIMIT = {"float32": 1e-2, "bfloat16": 0.2}
SUMMED = ("ratio_mean", "clip_low_fraction", "clip_high_fraction", "kl", "entropy", "loss")


def learning_rate(step: int, config: RunConfig) -> float:
    """Rate of optimiser step number `step` (from 0, over all iterations): linear warm-up, then constant."""
    return config.train.learning_rate * min(1.0, (step + 1) / max(1, config.train.warmup_steps))


@dataclass
class Updater:
    """Runs optimiser steps; all ranks call every method together, with the same global batch.

    `old_log_probs` are those of the samples' policy, one [S] tensor for each sample of `data`.
    """

    engine: Zero3Engine
    data: IterationData
    config: RunConfig
    ranks: Ranks
    device: torch.device
    old_log_probs: list[torch.Tensor]

    def step(self, groups: Sequence[int], number: int, check_ratio: bool) -> dict[str, float]:
        """One optimiser step on whole groups; returns its metrics.

        Args:
            groups: positions in `data.groups`.
            number: of the optimiser step, from 0 over all iterations.
            check_ratio: whether the weights must still be those that drew the samples.

        Raises:
            TrainError: weights and samples do not match, or the loss or gradient is not finite.
        """
        started = time.perf_counter()
        batch = [sample for group in groups for sample in self.data.groups[group]]
        sums, worst, worst_sample = self._accumulate(batch)
        metrics = self._policy_metrics(sums / len(batch), worst)
        if check_ratio:
            self._check_ratio(worst, worst_sample)
            metrics["ratio/initial_max_deviation"] = worst
        rate = learning_rate(number, self.config)
        metrics["grad_norm"] = self.engine.step(rate)
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad or metrics["grad_norm"] < 0:
            raise TrainError(
                f"optimiser step {number + 1}: {', '.join(bad) or 'grad_norm'} is not finite; nothing of this "
                "iteration was stored. Lower train.learning_rate in a new run"
            )
        seconds = time.perf_counter() - started
        return {
            **self._reward_metrics(batch, groups),
            **metrics,
            "lr": rate,
            "time/step_s": seconds,
            "throughput/images_per_s": len(batch) / seconds,
            "memory/peak_gib": peak_gib(self.device),
        }

    def _accumulate(self, batch: list[int]) -> tuple[torch.Tensor, float, int]:
        """Gradients of the global batch; sums of `SUMMED` over its samples, the worst ratio and its sample."""
        share = micro_batches(batch, self.ranks.rank, self.ranks.world_size, self.config.train.micro_batch)
        sums = torch.zeros(len(SUMMED), dtype=torch.float64, device=self.device)
        worst, worst_sample = 0.0, batch[0]
        for i, micro in enumerate(share):
            weights = torch.tensor(micro.weights, device=self.device)
            loss, values = self._forward(micro)
            # A zero weight keeps padding in the graph, so that every rank runs the same backward.
            self.engine.backward((loss * weights).sum() / len(batch), last=i == len(share) - 1)
            rows = torch.stack([values[name] for name in SUMMED]).double()
            sums += torch.where(weights > 0, rows, torch.zeros_like(rows)).sum(dim=1)
            deviation = torch.where(weights > 0, values["ratio_max_deviation"], torch.zeros_like(weights))
            top = int(deviation.argmax())
            if not deviation[top] <= worst:
                worst, worst_sample = float(deviation[top]), micro.samples[top]
        return zero3.reduced_sum(sums), *zero3.largest(worst, worst_sample, self.device)

    def _forward(self, micro: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Per-sample loss [B] and detached per-sample values [B]."""
        policy = self.config.policy
        samples = [self.data.samples[i] for i in micro.samples]
        actions = self._stack([s.actions for s in samples])
        log_probs, entropy = self.engine([s.prompt for s in samples], actions, self.data.sampling)
        loss, values = grpo_loss(
            log_probs,
            self._stack([self.old_log_probs[i] for i in micro.samples]),
            self._stack([s.reference_log_probs for s in samples]),
            torch.tensor([s.advantage for s in samples], device=self.device),
            torch.ones_like(log_probs),  # every image token is a decision
            policy.clip_low,
            policy.clip_high,
            policy.kl_coefficient,
        )
        return loss, {**values, "entropy": entropy.mean(dim=1), "loss": loss.detach()}

    def _stack(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(tensors).to(self.device)

    def _check_ratio(self, worst: float, sample: int) -> None:
        limit = RATIO_LIMIT[self.config.backbone.dtype]
        if not worst <= limit:
            raise TrainError(
                f"before the first update |ratio - 1| is {worst:.3g} for sample {self.data.samples[sample].key}, above "
                f"{limit}: the training weights are not those that drew the samples. Delete the rollout and reward "
                "stages of this iteration and run them again; if it persists in bfloat16, set "
                "train.old_log_probs=recomputed in a new run"
            )

    def _policy_metrics(self, means: torch.Tensor, worst: float) -> dict[str, float]:
        value = dict(zip(SUMMED, means.tolist(), strict=True))
        return {
            "policy/loss": value["loss"],
            "ratio/mean": value["ratio_mean"],
            "ratio/max_deviation": worst,
            "clip/low_fraction": value["clip_low_fraction"],
            "clip/high_fraction": value["clip_high_fraction"],
            "kl": value["kl"],
            "entropy": value["entropy"],
        }

    def _reward_metrics(self, batch: list[int], groups: Sequence[int]) -> dict[str, float]:
        samples = self.data.samples
        spreads = [statistics.stdev(samples[i].used_reward for i in self.data.groups[g]) for g in groups]
        return {
            "reward": statistics.fmean(samples[i].reward for i in batch),
            "reward_std": statistics.fmean(spreads),
            "frac_reward_zero_std": self.data.zero_std_share,
            "advantage/abs_mean": statistics.fmean(abs(samples[i].advantage) for i in batch),
        }


def recomputed_log_probs(
    engine: Zero3Engine, data: IterationData, micro_batch: int, ranks: Ranks, device: torch.device
) -> list[torch.Tensor]:
    """Log-probs [S] of every sample under the engine's weights; groups without signal keep those of the rollout."""
    live = [i for group in data.groups for i in group]
    old = [s.old_log_probs for s in data.samples]
    if not live:
        return old
    row = {sample: n for n, sample in enumerate(live)}
    table = torch.zeros(len(live), len(old[0]), device=device)
    with torch.no_grad():
        for micro in micro_batches(live, ranks.rank, ranks.world_size, micro_batch):
            samples: list[Sample] = [data.samples[i] for i in micro.samples]
            actions = torch.stack([s.actions for s in samples]).to(device)
            log_probs, _ = engine([s.prompt for s in samples], actions, data.sampling)
            for i, weight, values in zip(micro.samples, micro.weights, log_probs, strict=True):
                if weight:
                    table[row[i]] = values
    table = zero3.reduced_sum(table).cpu()
    for sample, n in row.items():
        old[sample] = table[n]
    return old


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process: of the GPU where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
