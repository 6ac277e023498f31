"""The vision tower: SigLIP on images of any size, as sequences of patches; and its way into the language model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from unified_rl.backbones.bagel.config import VisionConfig


class FeedForward(nn.Module):
    """Two layers around a tanh-approximated GELU; also the connector to the language model."""

    def __init__(self, width: int, inner: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, out)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[..., out] of [..., width]."""
        return self.fc2(F.gelu(self.fc1(states), approximate="tanh"))


class VisionAttention(nn.Module):
    """Every patch of an image sees every other."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.hidden, config.hidden)
        self.k_proj = nn.Linear(config.hidden, config.hidden)
        self.v_proj = nn.Linear(config.hidden, config.hidden)
        self.out_proj = nn.Linear(config.hidden, config.hidden)

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[I, P, hidden] of the same; mask bool [I, 1, 1, P], the patches that may be seen."""
        queries, keys, values = (
            project(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class VisionLayer(nn.Module):
    """One encoder layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden, eps=config.norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden, eps=config.norm_eps)
        self.mlp = FeedForward(config.hidden, config.intermediate, config.hidden)

    def forward(self, states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[I, P, hidden] of the same."""
        states = states + self.self_attn(self.layer_norm1(states), mask)
        return states + self.mlp(self.layer_norm2(states))


class PatchEmbeddings(nn.Module):
    """Patches and their learned positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(3 * config.patch**2, config.hidden)
        self.position_embedding = nn.Embedding(config.side**2, config.hidden)

    def forward(self, patches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[I, P, hidden] of patches [I, P, 3 * patch * patch] at int64 [I, P] positions."""
        return self.patch_embedding(patches) + self.position_embedding(positions)


class VisionEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.layers))


class VisionTransformer(nn.Module):
    """Embeddings, layers and the final norm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden, eps=config.norm_eps)


class VisionTower(nn.Module):
    """All of it, nested as in the checkpoint."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.vision_model = VisionTransformer(config)

    def forward(self, patches: torch.Tensor, positions: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """[I, P, hidden] states of I padded images.

        Args:
            patches: [I, P, 3 * patch * patch]; positions: int64 [I, P]; valid: bool [I, P].
        """
        inner = self.vision_model
        mask = None if bool(valid.all()) else valid[:, None, None]
        states = inner.embeddings(patches.to(inner.embeddings.patch_embedding.weight.dtype), positions)
        for layer in inner.encoder.layers:
            states = layer(states, mask)
        return inner.post_layernorm(states)
