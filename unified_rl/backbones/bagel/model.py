"""BAGEL's network: what reads text and pictures and predicts the next token, and what moves latents out of noise.

One forward serves every use. Reading: a pass over text and pictures returns states and a context. Writing: the same,
a token a row at a time behind a reserved context. Drawing: a pass over noisy latents behind a prompt's context, whose
velocity is wanted and whose new context is thrown away. Training: either, with gradients; context and continuation
may be one pass, which under ZeRO-3 collects every layer's weights once.

Under ZeRO-3 all ranks must make the same passes: one without latents skips the generation experts, one without
pictures the vision tower.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from unified_rl.backbones.bagel.config import BagelConfig
from unified_rl.backbones.bagel.context import Context
from unified_rl.backbones.bagel.layers import Hidden, LanguageModel, Pass
from unified_rl.backbones.bagel.positions import PositionTable, TimeEmbedder
from unified_rl.backbones.bagel.sequence import Packed
from unified_rl.backbones.bagel.vision import FeedForward, VisionTower
from unified_rl.backbones.base import BackboneError

LOGITS = 2**27  # numbers in the logits that are computed together


class BagelModel(nn.Module):
    """The network under the public checkpoint's parameter names; the VAE is apart.

    Attributes:
        attention: `sdpa` or `flash_attention_2`.
    """

    def __init__(self, config: BagelConfig, attention: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.attention = attention
        hidden = config.language.hidden
        self.language_model = LanguageModel(config.language)
        self.vit_model = VisionTower(config.vision)
        self.connector = FeedForward(config.vision.hidden, hidden, hidden)
        self.vit_pos_embed = PositionTable(config.vision.side, hidden)
        self.time_embedder = TimeEmbedder(hidden)
        self.vae2llm = nn.Linear(config.latent_width, hidden)
        self.llm2vae = nn.Linear(hidden, config.latent_width)
        self.latent_pos_embed = PositionTable(config.latent_side, hidden)

    def enable_activation_checkpointing(self, share: float = 1.0) -> None:
        """Recompute the first `share` of the language model's layers in the backward pass."""
        decoder = self.language_model.model
        decoder.recomputed = math.ceil(share * len(decoder.layers))

    def forward(self, packed: Packed, context: Context) -> tuple[Hidden, Context]:
        """Run one pass.

        Args:
            packed: on the model's device, its rows starting at the context's positions.
            context: of the same B rows.

        Returns:
            Normed states of all tokens, and the context with these tokens behind it.

        Raises:
            BackboneError: another number of rows than the context has.
        """
        if len(packed.segments) != context.batch:
            raise BackboneError(f"{len(packed.segments)} rows behind a context of {context.batch}; see Context.take")
        states = Hidden(self._understanding_inputs(packed), self._generation_inputs(packed))
        shared = Pass.of(packed, context, self.attention, self.config.language)
        hidden, layers = self.language_model.model(states, shared)
        return hidden, context.after(layers, packed)

    def _understanding_inputs(self, packed: Packed) -> torch.Tensor:
        """[Tu, hidden]: text and boundary tokens, patches of pictures."""
        text = self.language_model.model.embed_tokens(packed.ids)
        if not len(packed.patches):
            return text[packed.understanding_order]
        seen = self.vit_model(packed.patches, packed.patch_positions, packed.patch_valid)[packed.patch_valid]
        where = self.vit_pos_embed(packed.patch_positions[packed.patch_valid])
        return torch.cat([text, self.connector(seen) + where])[packed.understanding_order]

    def _generation_inputs(self, packed: Packed) -> torch.Tensor | None:
        """[Tg, hidden]: latent tokens with their time and place."""
        if not len(packed.latents):
            return None
        tokens = self.vae2llm(packed.latents.to(self.vae2llm.weight.dtype))
        return tokens + self.time_embedder(packed.times) + self.latent_pos_embed(packed.latent_positions)

    def velocity(self, packed: Packed, context: Context) -> torch.Tensor:
        """fp32 [Tg, latent width]: noise minus image, as predicted for every latent token of the pass.

        A context from `Context.take` lets all samples of a prompt share what was read once.
        """
        hidden, _ = self(packed, context)
        return self.llm2vae(hidden.generation).float()

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[..., vocabulary] for the token after each of the understanding states [..., hidden]."""
        return self.language_model.lm_head(states)

    def text_log_probs(self, packed: Packed, context: Context) -> torch.Tensor:
        """fp32 [B, L - 1]: log-probability in nats of slot i + 1's token given everything before it.

        Args:
            packed: a pass of one text segment a row, padded on the right; 0 where slot i + 1 is padding.
        """
        hidden, _ = self(packed, context)
        rows, ids = packed.in_rows(hidden.understanding), packed.in_rows(packed.ids)
        valid = packed.in_rows(torch.ones_like(packed.ids, dtype=torch.bool))[:, 1:]
        states, targets = rows[:, :-1][valid], ids[:, 1:][valid]
        # In parts: the logits over a large vocabulary are by far the largest tensor here.
        size = max(1, LOGITS // self.config.language.vocabulary)
        scores = [
            -F.cross_entropy(self.logits(some).float(), wanted, reduction="none")
            for some, wanted in zip(states.split(size), targets.split(size), strict=True)
        ]
        return torch.zeros(valid.shape, device=states.device).masked_scatter(valid, torch.cat(scores))
