"""Clipped policy-gradient loss with a penalty towards the reference (GvU section 3.4)."""

from __future__ import annotations

import torch


def grpo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    kl: torch.Tensor,
    advantages: torch.Tensor,
    step_mask: torch.Tensor,
    clip_low: float,
    clip_high: float,
    kl_coefficient: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of each sample: mean over its policy steps of `-min(r A, clip(r) A) + beta kl`.

    Args:
        log_probs: [B, S] of the policy being trained; carries the gradient.
        old_log_probs: [B, S] of the policy that drew the samples.
        kl: [B, S] divergence from the base policy at each step, exact or k3; carries its gradient.
        advantages: [B], one scalar per sample, shared by its steps.
        step_mask: [B, S], 1 where a step was a decision of the policy.
        clip_low, clip_high: the ratio is held in `[1 - clip_low, 1 + clip_high]`.
        kl_coefficient: weight beta of the divergence.

    Returns:
        per_sample_loss: fp32 [B], differentiable.
        metrics: detached fp32 [B] tensors, each a mean over steps but `ratio_max_deviation`, a maximum:
            ratio_mean, ratio_max_deviation, clip_low_fraction, clip_high_fraction (steps where the bound is
            active, that is where it stops the gradient), kl.
    """
    log_probs, mask = log_probs.float(), step_mask.float()
    steps = mask.sum(dim=1).clamp_min(1.0)
    advantages = advantages.float()[:, None]

    def step_mean(values: torch.Tensor) -> torch.Tensor:
        return (values * mask).sum(dim=1) / steps

    # Masked steps hold arbitrary numbers; their ratio is set to one before exp so that no inf * 0 appears.
    ratio = ((log_probs - old_log_probs.float()) * mask).exp()
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    surrogate = torch.minimum(ratio * advantages, bounded * advantages)
    kl = torch.where(mask > 0, kl.float(), torch.zeros_like(mask))
    loss = step_mean(kl_coefficient * kl - surrogate)
    with torch.no_grad():
        metrics = {
            "ratio_mean": step_mean(ratio),
            "ratio_max_deviation": ((ratio - 1.0).abs() * mask).amax(dim=1),
            "clip_low_fraction": step_mean(((ratio < 1.0 - clip_low) & (advantages < 0)).float()),
            "clip_high_fraction": step_mean(((ratio > 1.0 + clip_high) & (advantages > 0)).float()),
            "kl": step_mean(kl),
        }
    return loss, metrics
