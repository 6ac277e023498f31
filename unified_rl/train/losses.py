"""The two updates as losses of micro-batches: GRPO on the decisions that drew an image, or its reward-weighted loss."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from unified_rl.backbones.base import ReplaySettings, Trajectory, stack_trajectories
from unified_rl.config import RunConfig
from unified_rl.policy.grpo import grpo_loss
from unified_rl.policy.reward_weighted import reward_weighted_loss
from unified_rl.runtime import sample_seed
from unified_rl.train.batching import permuted
from unified_rl.train.samples import IterationData, Sample
from unified_rl.train.zero3 import TrainError, Zero3Engine

Values = dict[str, torch.Tensor]


@dataclass
class GrpoUpdate:
    """Clipped policy gradient over the decisions of each image.

    Attributes:
        old_log_probs: of the samples' policy, one [S] tensor for each sample of the iteration.
    """

    engine: Zero3Engine
    data: IterationData
    config: RunConfig
    device: torch.device
    sampling: ReplaySettings
    old_log_probs: list[torch.Tensor]
    # Name of a per-sample value -> name of its mean in the metrics.
    metrics: ClassVar[dict[str, str]] = {
        "loss": "policy/loss",
        "ratio_mean": "ratio/mean",
        "clip_low_fraction": "clip/low_fraction",
        "clip_high_fraction": "clip/high_fraction",
        "kl": "kl",
        "entropy": "entropy",
    }

    def __call__(self, rows: Sequence[int], number: int) -> tuple[torch.Tensor, Values]:
        """Loss [B] of the samples `rows` in optimiser step `number`, and detached per-sample values [B]."""
        policy = self.config.policy
        samples = [self.data.samples[i] for i in rows]
        steps = self._steps(len(self.old_log_probs[rows[0]]), number)
        log_probs, kl, entropy = self.engine(
            "decisions", *inputs_of(samples, self.device), self.sampling, steps, plans_of(samples),
            self._chosen([s.reference for s in samples], steps),
        )  # fmt: skip
        loss, values = grpo_loss(
            log_probs,
            self._chosen([self.old_log_probs[i] for i in rows], steps),
            kl,
            torch.tensor([s.advantage for s in samples], device=self.device),
            torch.ones_like(log_probs),  # every stored step is a decision
            policy.clip_low,
            policy.clip_high,
            policy.kl_coefficient,
        )
        return loss, {**values, "entropy": entropy.mean(dim=1), "loss": loss.detach()}

    def _steps(self, decisions: int, number: int) -> list[int] | None:
        """Which decisions this optimiser step trains; the same for all its images, so that all ranks do alike."""
        wanted = self.config.policy.steps_per_update
        if not wanted or wanted >= decisions:
            return None
        return sorted(permuted(decisions, sample_seed(self.config.seed, number, "decisions", 0))[:wanted])

    def _chosen(self, tensors: list[torch.Tensor], steps: list[int] | None) -> torch.Tensor:
        stacked = torch.stack(tensors).to(self.device)
        return stacked if steps is None else stacked[:, steps]


@dataclass
class RewardWeightedUpdate:
    """The images' own drawing loss, every cell weighted by its reward."""

    engine: Zero3Engine
    data: IterationData
    config: RunConfig
    device: torch.device
    metrics: ClassVar[dict[str, str]] = {
        "loss": "policy/loss",
        "reward_loss": "weighted/reward_loss",
        "reference_loss": "weighted/reference_loss",
        "weight_mean": "weighted/weight_mean",
        "weight_min": "weighted/weight_min",
        "weight_max": "weighted/weight_max",
        "negative_fraction": "weighted/negative_fraction",
    }

    def __call__(self, rows: Sequence[int], number: int) -> tuple[torch.Tensor, Values]:
        """As for `GrpoUpdate`; noise and time of a sample change with every optimiser step."""
        policy = self.config.policy
        samples = [self.data.samples[i] for i in rows]
        seeds = [sample_seed(self.config.seed, number, s.key, 0) for s in samples]
        hidden = [random.Random(f"hidden-{seed}").random() < policy.hidden_prompts for seed in seeds]
        losses = self.engine("cell_losses", *inputs_of(samples, self.device), seeds, policy.flow_shift, hidden)
        loss, values = reward_weighted_loss(
            losses,
            torch.stack([self._map(s, losses.shape[1]) for s in samples]).to(self.device),
            torch.ones_like(losses),
            policy.reference_weight,
            policy.min_weight,
        )
        return loss, {**values, "loss": loss.detach()}

    def _map(self, sample: Sample, cells: int) -> torch.Tensor:
        """fp32 [N] reward of every cell, in -1..1."""
        policy = self.config.policy
        if policy.control == "constant":
            return torch.full((cells,), 1.0 - policy.reference_weight)
        if sample.weights is None:
            reward = sample.advantage / policy.advantage_limit
            return torch.full((cells,), min(1.0, max(-1.0, reward)))
        if len(sample.weights) != cells:
            raise TrainError(
                f"sample {sample.key}: its reward map has {len(sample.weights)} cells, the image {cells}; delete the "
                "reward stage of this iteration and run it again"
            )
        return sample.weights


def inputs_of(samples: Sequence[Sample], device: torch.device) -> tuple[list[str], Trajectory]:
    """Prompts and trajectory of samples, as the drawing path takes them."""
    return [s.prompt for s in samples], stack_trajectories([s.tensors for s in samples]).to(device)


def plans_of(samples: Sequence[Sample]) -> list[str] | None:
    """Plans that the samples were drawn from; None where there are none."""
    plans = [s.plan for s in samples]
    return None if None in plans else plans
