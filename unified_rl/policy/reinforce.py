"""REINFORCE with a penalty towards the reference, for written answers (Ask-Solve-Generate, arXiv 2606.27376).

There is no ratio: answers are used once, by the policy that sampled them, under the very question that they answered.
"""

from __future__ import annotations

import torch


def reinforce_loss(
    log_probs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    kl: torch.Tensor,
    kl_coefficient: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of each answer: mean over its tokens of `-A log p + beta kl`.

    Args:
        log_probs: [B, T] of the answers' tokens under the policy being trained; carries the gradient.
        advantages: [B], reward minus baseline; finite.
        mask: [B, T], 1 at tokens that the policy chose (end of turn included), 0 at padding, whose values do not
            matter, not even NaN.
        kl: [B, T] divergence from the reference at each token, see `Categorical.kl`; carries its gradient.
        kl_coefficient: beta, as `KlController` holds it.

    Returns:
        per_answer_loss: fp32 [B], differentiable; zero for an answer without tokens.
        metrics: detached fp32 [B], means over tokens: policy_loss (`-A log p`), log_prob, kl.

    Raises:
        ValueError: shapes that differ, or an advantage that is not finite (a failed score is a state, never a number).
    """
    shapes = [list(t.shape) for t in (log_probs, mask, kl)]
    if log_probs.dim() != 2 or shapes[0] != shapes[1] or shapes[0] != shapes[2] or len(advantages) != len(log_probs):
        raise ValueError(
            f"log-probs, mask and kl must share one shape [answers, tokens], got {shapes} for {len(advantages)} answers"
        )
    if not bool(torch.isfinite(advantages).all()):
        raise ValueError("an advantage is not a finite number")
    inside = mask > 0
    tokens = inside.sum(dim=1).clamp_min(1)

    def token_mean(values: torch.Tensor) -> torch.Tensor:
        return values.float().masked_fill(~inside, 0.0).sum(dim=1) / tokens

    log_prob, divergence = token_mean(log_probs), token_mean(kl)
    policy_loss = -advantages.to(log_prob) * log_prob
    metrics = {"policy_loss": policy_loss, "log_prob": log_prob, "kl": divergence}
    return policy_loss + kl_coefficient * divergence, {name: value.detach() for name, value in metrics.items()}
