"""Advantages relative to the group (GvU section 3.3; GRPO, arXiv 2402.03300) or to a baseline of the sample's kind."""

from __future__ import annotations

import torch


def group_advantages(
    rewards: torch.Tensor, std_eps: float = 1.0e-8, min_std: float = 1.0e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Standardise the rewards of each prompt's group of samples.

    Args:
        rewards: [N, G] final rewards of N groups; every value finite.
        std_eps: added to the standard deviation of the group.
        min_std: a group that spreads less than this carries no signal.

    Returns:
        advantages: fp64 [N, G], zero in groups without signal.
        live: bool [N], the groups that do carry signal.

    Raises:
        ValueError: not two dimensions, G < 2 (the unbiased deviation of one reward is undefined), or a reward
            that is not finite (a failed score is a state, never a number).
    """
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [groups, at least 2 samples], got {list(rewards.shape)}")
    rewards = rewards.double()
    bad = (~torch.isfinite(rewards)).nonzero()
    if len(bad):
        group, sample = bad[0].tolist()
        raise ValueError(f"reward of sample {sample} in group {group} is {rewards[group, sample]}, not a finite number")
    std = rewards.std(dim=1, unbiased=True)
    live = std >= min_std
    advantages = (rewards - rewards.mean(dim=1, keepdim=True)) / (std[:, None] + std_eps)
    return torch.where(live[:, None], advantages, torch.zeros_like(advantages)), live
