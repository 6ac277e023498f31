"""The language model: Qwen2's shape with every layer's weights twice, for reading and for drawing.

The names of modules are those of the public checkpoint; `moe_gen` marks what draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from unified_rl.backbones.bagel.attention import Attention
from unified_rl.backbones.bagel.config import LanguageConfig
from unified_rl.backbones.bagel.context import Context, LayerCache
from unified_rl.backbones.bagel.sequence import Packed

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, fp32 [T, 1, head size]


@dataclass(frozen=True)
class Hidden:
    """States of a pass by expert.

    Attributes:
        understanding: [Tu, hidden].
        generation: [Tg, hidden], None when the pass has no latents: the generation experts are then not called.
    """

    understanding: torch.Tensor
    generation: torch.Tensor | None


@dataclass(frozen=True)
class Pass:
    """What all layers share in one pass.

    Attributes:
        sources: int64 [B * L], which of the understanding tokens followed by the generation tokens fills each slot;
            padded slots hold token 0, and nobody sees them.
        rotations: of the understanding tokens, and of the generation tokens.
    """

    packed: Packed
    context: Context
    attention: Attention
    sources: torch.Tensor
    rotations: tuple[Rotation, Rotation]

    @classmethod
    def of(cls, packed: Packed, context: Context, implementation: str, config: LanguageConfig) -> Pass:
        """Prepare a pass over `packed`, which is on the model's device."""
        device = packed.positions.device
        slots = torch.cat([packed.understanding_slots, packed.generation_slots])
        sources = torch.zeros(packed.positions.numel(), dtype=torch.long, device=device)
        sources[slots] = torch.arange(len(slots), device=device)
        positions = packed.positions.flatten()
        return cls(
            packed,
            context,
            Attention(packed, context.valid, implementation, device),
            sources,
            (
                rotation(positions[packed.understanding_slots], config),
                rotation(positions[packed.generation_slots], config),
            ),
        )


def rotation(positions: torch.Tensor, config: LanguageConfig) -> Rotation:
    """Rotary angles of int64 [T] positions."""
    size = config.head_size
    powers = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
    angles = positions.float()[:, None] * (1.0 / config.rope_theta**powers)
    angles = torch.cat([angles, angles], 1)[:, None]
    return angles.cos(), angles.sin()


def rotate(states: torch.Tensor, by: Rotation) -> torch.Tensor:
    """fp32 [T, heads, head size], every pair (i, i + size / 2) of a head turned by its angle."""
    first, second = states.float().chunk(2, -1)
    return states.float() * by[0] + torch.cat([-second, first], -1) * by[1]


class RMSNorm(nn.Module):
    """Division by the root mean square, in fp32, then a learned scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype as `states` [..., width]."""
        wide = states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(states.dtype)


class MLP(nn.Module):
    """Gated feed-forward layer."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[T, hidden] of the same."""
        return self.down_proj(F.silu(self.gate_proj(states)) * self.up_proj(states))


class JointAttention(nn.Module):
    """One attention over all tokens, with each expert's own projections and norms."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        hidden, size, eps = config.hidden, config.head_size, config.norm_eps
        for expert in ("", "_moe_gen"):
            setattr(self, f"q_proj{expert}", nn.Linear(hidden, config.heads * size))
            setattr(self, f"k_proj{expert}", nn.Linear(hidden, config.kv_heads * size))
            setattr(self, f"v_proj{expert}", nn.Linear(hidden, config.kv_heads * size))
            setattr(self, f"o_proj{expert}", nn.Linear(config.heads * size, hidden, bias=False))
            setattr(self, f"q_norm{expert}", RMSNorm(size, eps))
            setattr(self, f"k_norm{expert}", RMSNorm(size, eps))

    def forward(self, states: Hidden, shared: Pass, layer: int) -> tuple[Hidden, LayerCache]:
        """Mixed states, and the layer's keys and values with those of this pass."""
        parts = [self._project(states.understanding, "", shared.rotations[0])]
        if states.generation is not None:
            parts.append(self._project(states.generation, "_moe_gen", shared.rotations[1]))
        size = shared.packed.positions.shape
        queries, keys, values = (
            torch.cat(part).index_select(0, shared.sources).unflatten(0, size) for part in zip(*parts, strict=True)
        )
        cache = shared.context.extended(layer, keys, values)
        mixed = shared.attention(queries, *cache).flatten(2).flatten(0, 1)
        understanding = self.o_proj(mixed[shared.packed.understanding_slots])
        if states.generation is None:
            return Hidden(understanding, None), cache
        return Hidden(understanding, self.o_proj_moe_gen(mixed[shared.packed.generation_slots])), cache

    def _project(self, states: torch.Tensor, expert: str, by: Rotation) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values [T, heads, head size] of [T, hidden]."""
        queries, keys, values = (
            getattr(self, f"{kind}_proj{expert}")(states).unflatten(-1, (-1, self.config.head_size)) for kind in "qkv"
        )
        # In fp32 until after the rotation, as the public code does when it draws.
        queries = rotate(getattr(self, f"q_norm{expert}")(queries.float()), by)
        keys = rotate(getattr(self, f"k_norm{expert}")(keys.float()), by)
        return queries.to(values.dtype), keys.to(values.dtype), values


class Layer(nn.Module):
    """A decoder layer with both experts."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.self_attn = JointAttention(config)
        for expert in ("", "_moe_gen"):
            setattr(self, f"mlp{expert}", MLP(config))
            setattr(self, f"input_layernorm{expert}", RMSNorm(config.hidden, config.norm_eps))
            setattr(self, f"post_attention_layernorm{expert}", RMSNorm(config.hidden, config.norm_eps))

    def forward(
        self, understanding: torch.Tensor, generation: torch.Tensor | None, shared: Pass, index: int
    ) -> tuple[torch.Tensor, torch.Tensor | None, LayerCache]:
        """States [Tu, hidden], [Tg, hidden] after layer `index`, and its cache."""
        normed = Hidden(
            self.input_layernorm(understanding),
            None if generation is None else self.input_layernorm_moe_gen(generation),
        )
        mixed, cache = self.self_attn(normed, shared, index)
        understanding = understanding + mixed.understanding
        understanding = understanding + self.mlp(self.post_attention_layernorm(understanding))
        if generation is not None:
            generation = generation + mixed.generation
            generation = generation + self.mlp_moe_gen(self.post_attention_layernorm_moe_gen(generation))
        return understanding, generation, cache


class Decoder(nn.Module):
    """Token embeddings, layers and final norms."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)
        self.norm_moe_gen = RMSNorm(config.hidden, config.norm_eps)
        self.recomputed = 0  # layers that the backward pass runs again, from the first one on

    def forward(self, states: Hidden, shared: Pass) -> tuple[Hidden, list[LayerCache]]:
        """Normed states after the last layer, and every layer's cache."""
        understanding, generation, caches = states.understanding, states.generation, []
        recomputed = self.recomputed if torch.is_grad_enabled() else 0
        for index, layer in enumerate(self.layers):
            arguments = (understanding, generation, shared, index)
            outputs = checkpoint(layer, *arguments, use_reentrant=False) if index < recomputed else layer(*arguments)
            understanding, generation, cache = outputs
            caches.append(cache)
        drawn = None if generation is None else self.norm_moe_gen(generation)
        return Hidden(self.norm(understanding), drawn), caches


class LanguageModel(nn.Module):
    """Decoder and text head, as the checkpoint nests them."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden, config.vocabulary, bias=False)
