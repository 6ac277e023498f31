"""GvU's intrinsic reward: how probable the prompt is as a description of the image (arXiv 2603.06043, section 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from unified_rl.backbones.load import Backbone


@dataclass(frozen=True)
class GvuScore:
    """Score of one image.

    Attributes:
        tokens: the L text pieces of the prompt.
        token_log_probs: fp32 [L], natural log of p(T_j | image, question, T_<j).
        mean_log_prob: their mean, at most 0; NaN when the judge gave a non-finite value.
    """

    tokens: list[str]
    token_log_probs: torch.Tensor
    mean_log_prob: float

    @property
    def geometric_mean(self) -> float:
        """exp(mean log-probability), in 0..1: the reward of the paper."""
        return math.exp(self.mean_log_prob)


@torch.inference_mode()
def gvu_scores(judge: Backbone, images: list[np.ndarray], prompts: list[str], question: str) -> list[GvuScore]:
    """Scores of uint8 [H, W, 3] images for their prompts, in one teacher-forced forward.

    Equal to multiplying L next-token probabilities and taking the L-th root, but in log space (a product underflows on
    long prompts) and without L forwards. The end-of-turn token is not scored.
    """
    score = judge.text_logps(images, [question] * len(images), prompts)
    scores = []
    for log_probs, mask, ids in zip(score.log_probs.cpu(), score.mask.cpu().bool(), score.ids.cpu(), strict=True):
        kept = log_probs[mask].float().clone()
        tokens = [judge.tokenizer.decode([i]) for i in ids[mask].tolist()]
        scores.append(GvuScore(tokens, kept, float(kept.double().mean())))
    return scores
