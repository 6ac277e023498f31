"""The part of a backbone that writes about images, as one module for the engine: the way of Proposer and Solver."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from unified_rl.backbones.base import Categorical
from unified_rl.backbones.load import Backbone
from unified_rl.train.drawing import drawing_modules


class ReadingPath(nn.Module):
    """The modules that read and write, beside `DrawingPath`; one door, `forward`, as the engine's hooks guard it.

    The model carries one adapter, that of the role, which acts unless it is switched off: also when a backward pass
    computes activations again.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.answer_logits, self.role = backbone.answer_logits, backbone.role
        for name, module in drawing_modules(backbone.model, backbone.frozen_when_reading()):
            self.add_module(name.replace(".", "__"), module)

    def forward(
        self,
        images: Sequence[np.ndarray],
        questions: Sequence[str],
        ids: torch.Tensor,
        mask: torch.Tensor,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of sampled tokens: log-probs, exact divergence from the base model in nats, entropies; fp32 [B, T] each.

        All of the whole vocabulary at `temperature`; what a nucleus left out counts. Entropies carry no gradient.

        Args:
            images: B of uint8 [H, W, 3]; questions: B.
            ids: int64 [B, T] as they were sampled; mask: fp32 [B, T], 0 at padding.
        """
        with torch.no_grad(), self.role(None):
            reference = self.answer_logits(images, questions, ids, mask) / temperature
        distribution = Categorical(self.answer_logits(images, questions, ids, mask) / temperature)
        log_probs, kl = distribution.log_prob(ids), distribution.kl(Categorical(reference))
        with torch.no_grad():
            entropy = distribution.entropy()
        return log_probs, kl, entropy
