"""Reward-weighted loss with a reference constraint (SRUM, arXiv 2510.12784, eqs. 1 to 3).

The paper adds two terms, `L_r = mean(alpha R l)` and `lambda L_ref = lambda mean(l)`, over the same losses `l` of
the same self-generated image. They are one loss with the weight `alpha R + lambda`, so one forward serves both.
"""

from __future__ import annotations

import math

import torch


def reward_weighted_loss(
    cell_losses: torch.Tensor,
    reward_map: torch.Tensor,
    mask: torch.Tensor,
    reference_weight: float = 0.5,
    min_weight: float = 0.0,
    repelled_loss_cap: float = math.inf,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of each image: mean over its cells of `max(alpha R + lambda, min_weight) * l`.

    Images of one size can be averaged as they are. Where sizes differ, weight each with its number of cells
    (`mask.sum(1)` over the global count), so that every cell counts the same.

    Args:
        cell_losses: [B, N], at least 0, of flow or tokens; carries the gradient.
        reward_map: [B, N] alpha R, in -1..1, cells in the order of `cell_losses`. A map of ones with
            `reference_weight` 0 is the plain loss.
        mask: [B, N], 1 at cells of the image, 0 at padding (whose values do not matter, not even NaN).
        reference_weight: lambda, the pull towards the image as it is; 0.5 in the paper.
        min_weight: lower bound of the weight. Below 0 the loss falls without end as the cell gets worse; the default
            of 0 only lets go of such cells, `-math.inf` is the paper's formula, which pushes them away.
        repelled_loss_cap: a cell of negative weight whose loss is above this is not pushed further.

    Returns:
        per_image_loss: fp32 (fp64 if given) [B], differentiable; zero for an image without cells.
        metrics: detached [B] tensors, each a mean over cells but the extremes: reward_loss (L_r) and reference_loss
            (L_ref, without lambda), weight_mean, weight_min, weight_max of the weights in use, and negative_fraction,
            cells where `alpha R + lambda` is below zero. Without a bound in force,
            loss = reward_loss + lambda reference_loss.

    Raises:
        ValueError: shapes that differ, a map value outside -1..1 at a cell of an image, or a negative lambda.
    """
    inside = mask > 0
    _check(cell_losses, reward_map, inside, reference_weight)
    losses = cell_losses.to(torch.promote_types(cell_losses.dtype, torch.float32)).masked_fill(~inside, 0.0)
    reward_map = reward_map.to(losses.dtype).masked_fill(~inside, 0.0)
    cells = inside.sum(dim=1).clamp_min(1)
    wanted = reward_map + reference_weight
    weights = wanted.clamp_min(min_weight)
    weighted = weights * torch.where(weights < 0, losses.clamp_max(repelled_loss_cap), losses)

    def cell_mean(values: torch.Tensor) -> torch.Tensor:
        return values.masked_fill(~inside, 0.0).sum(dim=1) / cells

    with torch.no_grad():
        empty = ~inside.any(dim=1)
        metrics = {
            "reward_loss": cell_mean(reward_map * losses),
            "reference_loss": cell_mean(losses),
            "weight_mean": cell_mean(weights),
            "weight_min": weights.masked_fill(~inside, math.inf).amin(dim=1).masked_fill(empty, 0.0),
            "weight_max": weights.masked_fill(~inside, -math.inf).amax(dim=1).masked_fill(empty, 0.0),
            "negative_fraction": cell_mean((wanted < 0).to(losses.dtype)),
        }
    return cell_mean(weighted), metrics


def _check(cell_losses: torch.Tensor, reward_map: torch.Tensor, inside: torch.Tensor, reference_weight: float) -> None:
    shapes = [list(t.shape) for t in (cell_losses, reward_map, inside)]
    if cell_losses.dim() != 2 or shapes[0] != shapes[1] or shapes[0] != shapes[2]:
        raise ValueError(f"losses, map and mask must share one shape [images, cells], got {shapes}")
    # Rounding in the resampling of a map may pass 1 by a few units in the last place.
    if not bool(((reward_map.abs() <= 1.0 + 1.0e-5) | ~inside).all()):
        raise ValueError("the reward map has a value outside -1..1")
    if not (math.isfinite(reference_weight) and reference_weight >= 0):
        raise ValueError(f"the reference weight must be a number of at least 0, not {reference_weight!r}")
