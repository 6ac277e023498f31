"""The updates of the roles that write, as losses of micro-batches: GRPO for the Proposer, REINFORCE for the Solver."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from unified_rl.config import RunConfig
from unified_rl.policy.controllers import KlController, RunningMean
from unified_rl.policy.grpo import grpo_loss
from unified_rl.policy.reinforce import reinforce_loss
from unified_rl.train.losses import Values
from unified_rl.train.texts import TextData
from unified_rl.train.zero3 import Zero3Engine


@dataclass(frozen=True)
class RoleState:
    """What a role's update adapts from step to step; the checkpoint's marker stores it.

    Attributes:
        controller: of the divergence from the base model.
        baseline: mean reward of earlier answers; of the Solver only.
    """

    controller: KlController
    baseline: RunningMean

    @classmethod
    def of(cls, config: RunConfig, stored: Mapping[str, Any] | None, reward_mean: float) -> RoleState:
        """The `stored` state, or the one to begin with in an iteration of this mean reward.

        A baseline that began at 0 would reinforce whatever was answered until it has caught up, random rewards too.
        """
        if stored:
            return cls(KlController.from_dict(stored["controller"]), RunningMean.from_dict(stored["baseline"]))
        roles = config.self_consistency
        controller = KlController(target=roles.kl_target, rate=roles.kl_rate)
        return cls(controller, RunningMean(reward_mean))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"controller": self.controller.to_dict(), "baseline": self.baseline.to_dict()}


def padded(rows: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Rows of different lengths as [B, T], zeros on the right."""
    return pad_sequence(list(rows), batch_first=True).to(device)


@dataclass
class TextUpdate:
    """What both have in common: texts replayed at the temperature that they were sampled with.

    All ranks call it with the same global batches and come to the same `state`.

    Attributes:
        old_log_probs: of the policy that wrote the texts, one [T] tensor for each of the iteration.
    """

    engine: Zero3Engine
    data: TextData
    config: RunConfig
    device: torch.device
    state: RoleState
    old_log_probs: list[torch.Tensor] = field(default_factory=list)
    role: ClassVar[str]
    # Name of a per-sample value -> name of its mean in the metrics.
    metrics: ClassVar[dict[str, str]] = {name: name for name in ("loss", "kl", "entropy", "log_prob")}

    def replay(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mask, log-probs, divergence from the base model and entropies of the texts `rows`: fp32 [B, T] each."""
        samples = [self.data.samples[i] for i in rows]
        ids = padded([s.ids for s in samples], self.device)
        mask = padded([torch.ones(len(s.ids)) for s in samples], self.device)
        images, questions = [s.image for s in samples], [s.question for s in samples]
        temperature = getattr(self.config.self_consistency, f"{self.role}_temperature")
        return mask, *self.engine(images, questions, ids, mask, temperature)

    def __call__(self, rows: Sequence[int], number: int) -> tuple[torch.Tensor, Values]:
        """Loss [B] of the texts `rows`, and detached per-sample values [B]; `number` is not needed."""
        mask, log_probs, kl, entropy = self.replay(rows)
        old = padded([self.old_log_probs[i] for i in rows], self.device)
        loss, values = self.loss(rows, log_probs, old, kl, mask)
        with torch.no_grad():
            tokens = mask.sum(dim=1)
            means = {n: (v * mask).sum(1) / tokens for n, v in (("entropy", entropy), ("log_prob", log_probs))}
            deviation = (((log_probs - old) * mask).exp() - 1.0).abs().amax(dim=1)
        return loss, {**values, **means, "ratio_max_deviation": deviation, "loss": loss.detach()}

    def loss(
        self, rows: Sequence[int], log_probs: torch.Tensor, old: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, Values]:
        """The role's own loss [B] and its values, from [B, T] tensors."""
        raise NotImplementedError

    def after_step(self, batch: Sequence[int], kl: float) -> dict[str, float]:
        """Adapt to a step on `batch` with mean divergence `kl` over all ranks; what the step used, for its metrics."""
        controller = self.state.controller
        self.state = replace(self.state, controller=controller.updated(kl))
        return {"kl_coefficient": controller.coefficient}


class ProposerUpdate(TextUpdate):
    """Clipped policy gradient on replies that are compared with the others about the same image."""

    role = "proposer"
    metrics = TextUpdate.metrics | {
        "ratio_mean": "ratio/mean",
        "clip_low_fraction": "clip/low_fraction",
        "clip_high_fraction": "clip/high_fraction",
    }

    def loss(
        self, rows: Sequence[int], log_probs: torch.Tensor, old: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, Values]:
        """`grpo_loss` of the replies."""
        policy = self.config.policy
        advantages = torch.tensor([self.data.samples[i].advantage for i in rows], device=self.device)
        return grpo_loss(
            log_probs, old, kl, advantages, mask, policy.clip_low, policy.clip_high, self.state.controller.coefficient
        )


class SolverUpdate(TextUpdate):
    """REINFORCE on answers, their rewards taken above a running mean of earlier steps."""

    role = "solver"
    metrics = TextUpdate.metrics | {"policy_loss": "policy_loss"}

    def loss(
        self, rows: Sequence[int], log_probs: torch.Tensor, old: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, Values]:
        """`reinforce_loss` of the answers."""
        baseline = self.state.baseline.value
        above = [self.data.samples[i].used_reward - baseline for i in rows]
        advantages = torch.tensor(above, device=self.device)
        return reinforce_loss(log_probs, advantages, mask, kl, self.state.controller.coefficient)

    def after_step(self, batch: Sequence[int], kl: float) -> dict[str, float]:
        """Also the baseline, by the rewards of all ranks."""
        baseline, rewards = self.state.baseline, [self.data.samples[i].used_reward for i in batch]
        self.state = replace(self.state, baseline=baseline.updated(rewards))
        above = statistics.fmean(abs(reward - baseline.value) for reward in rewards)
        return {**super().after_step(batch, kl), "baseline": baseline.value, "advantage/abs_mean": above}
