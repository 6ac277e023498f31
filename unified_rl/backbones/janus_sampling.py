"""Own sampling loops for Janus: transformers' `generate` has no per-step scores and no per-sample seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache, JanusForConditionalGeneration
from transformers.cache_utils import DynamicLayer

from unified_rl.backbones.base import (
    BackboneError,
    Categorical,
    Sampling,
    TokenTraj,
    inverse_cdf,
    uniform_streams,
)

SAME_STATES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers that read the same, in their order
CPU_INFO = Path("/proc/cpuinfo")
INTEL = torch.backends.mkl.is_available() and CPU_INFO.is_file() and "GenuineIntel" in CPU_INFO.read_text()
BLOCK = 16  # columns by which what a step attends to grows
Product = Callable[[torch.Tensor], torch.Tensor]  # of states with weights


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """int64 [B, T] position of every token of a left-padded batch; padding gets 0."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


class RoomyLayer(DynamicLayer):
    """Keys and values [B, heads, T, size] of a layer, with room for more behind them that is filled in place.

    A growing cache copies everything at every step. transformers' static one attends to all of its room from the first
    step on, which for an image is twice the attention.

    Args:
        block: attended to are the columns in use, up to the next multiple of this; a mask has to hide the surplus.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, room: int, block: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.length, self.block = keys.shape[2], block
        self.keys, self.values = (F.pad(states, (0, 0, 0, room)) for states in (keys, values))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, heads, L, size] each; returns what is attended to."""
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = key_states, value_states
        self.length = end
        shown = -(-end // self.block) * self.block
        return self.keys[:, :, :shown], self.values[:, :, :shown]

    def get_seq_length(self) -> int:
        """Columns in use."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that a mask made by transformers has to have, and their offset."""
        return self.length + query_length, 0


class PrefixDecoder:
    """A language model after a prompt, ready for one token at a time.

    The prompt is run once; its keys and values are then copied once for every row that continues it.

    Args:
        language_model: of the Janus.
        embeddings: [P, T, D] prompts, padded on the left.
        mask: int64 [P, T].
        rows: int64 [B], the prompt that each row of the batch continues, -1 for none.
        new_tokens: how many tokens there will be behind it at most.

    Attributes:
        hidden: [B, D], the last layer's output after the newest token.

    Raises:
        BackboneError: the model recomputes activations, which excludes a cache.
    """

    def __init__(
        self,
        language_model: nn.Module,
        embeddings: torch.Tensor,
        mask: torch.Tensor,
        rows: torch.Tensor,
        new_tokens: int,
    ) -> None:
        if any(layer.training for layer in language_model.layers):  # transformers would drop the cache without a word
            raise BackboneError("activation checkpointing keeps no key-value cache; sample before switching it on")
        self.language_model = language_model
        self.length = mask.shape[1]
        prompt = DynamicCache(config=language_model.config)
        hidden = language_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions_of(mask),
            past_key_values=prompt,
            use_cache=True,
        ).last_hidden_state[:, -1]
        stored = rows.clamp_min(0)
        seen = mask[stored].bool() & (rows >= 0)[:, None]
        self.hidden = hidden[stored]
        self.position = seen.sum(1, keepdim=True) - 1
        # A ready-made [B, 1, L, K] mask spares transformers building one at every step, but only sdpa takes it.
        self.ready_made = language_model.config._attn_implementation == "sdpa"
        self.block = BLOCK if self.ready_made else 1
        self.cache = Cache(
            layers=[RoomyLayer(x.keys[stored], x.values[stored], new_tokens, self.block) for x in prompt.layers]
        )
        # Tokens that may be seen, bool [B, T + new_tokens]; grows with every step.
        self.visible = F.pad(seen, (0, new_tokens))

    def step(self, embeddings: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Append L tokens per row; returns the last layer's output after each, [B, L, D].

        Args:
            embeddings: [B, L, D].
            mask: [B, L], 0 at padding, on either side; default: no padding.
        """
        count = embeddings.shape[1]
        if mask is None:
            mask = torch.ones(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
        positions = self.position + mask.long().cumsum(1)
        self.visible[:, self.length : self.length + count] = mask.bool()
        self.length += count
        states = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=self._seen(count) if self.ready_made else self.visible[:, : self.length],
            position_ids=positions.clamp_min(0),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.hidden, self.position = states[:, -1], positions[:, -1:]
        return states

    def _seen(self, count: int) -> torch.Tensor:
        """bool [B, 1, count, K], what each of the newest tokens sees."""
        visible = self.visible[:, None, None, : -(-self.length // self.block) * self.block]
        if count == 1:
            return visible
        columns = torch.arange(visible.shape[-1], device=visible.device)
        own = torch.arange(self.length - count, self.length, device=columns.device)[:, None]
        # A padded token sees itself: a row of nothing but padding would have no softmax.
        return (visible & (columns <= own)) | (columns == own)


def guided(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """fp32 logits of the sampled distribution.

    Args:
        logits: [B, ...] of the conditional branch; with guidance [2B, ...], the unconditional rows second.
    """
    logits = logits.float()
    if sampling.guidance_scale != 1:
        conditional, unconditional = logits.chunk(2)
        logits = torch.add(unconditional, conditional - unconditional, alpha=sampling.guidance_scale)
    return logits if sampling.temperature == 1 else logits / sampling.temperature  # the same numbers, no copy


@contextmanager
def packed_linears(modules: Sequence[nn.Module], rows: int) -> Iterator[None]:
    """On a CPU, linear layers multiply few rows in half of the time inside, for a copy of their weights; no gradients.

    torch hands such a product to a library that lays out the weights for it again at every call. Here that is done once
    for all steps of a loop, and layers that read the same states are one product.

    Args:
        rows: of the batch.
    """
    able, inner = torch.backends.mkldnn.is_available(), (module for part in modules for module in part.modules())
    packed = [  # a weight that ZeRO-3 has partitioned is empty here
        [layer for layer in layers if able and layer.weight.device.type == "cpu" and layer.weight.numel()]
        for layers in _read_together(inner)
    ]
    for first, *others in filter(None, packed):
        first.forward = product = _packed(first, others, rows)
        if others:
            first.forward, later = _in_turn(product, [layer.out_features for layer in (first, *others)])
        for layer in others:
            layer.forward = later
    try:
        yield
    finally:
        for layer in (layer for layers in packed for layer in layers):
            del layer.forward


def _read_together(modules: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Linear layers of `modules`, those together that read the same states."""
    for module in modules:
        plain = {name: child for name, child in module.named_children() if type(child) is nn.Linear}
        for names in SAME_STATES:
            if plain.keys() >= set(names):
                yield [plain.pop(name) for name in names]
        yield from ([layer] for layer in plain.values())


def _packed(first: nn.Linear, others: Sequence[nn.Linear], rows: int) -> Product:
    """The product of `rows` states with all of their weights; by the library that is faster on this processor."""
    weight = torch.cat([layer.weight.detach() for layer in (first, *others)]) if others else first.weight.detach()
    bias = None if first.bias is None else torch.cat([layer.bias.detach() for layer in (first, *others)])
    if INTEL and weight.dtype == torch.float32:
        laid_out = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        return lambda states: torch.ops.mkl._mkl_linear(states, laid_out, weight, bias, rows)
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda states: torch.ops.mkldnn._linear_pointwise(states, laid_out, bias, "none", [], "")


def _in_turn(product: Product, sizes: list[int]) -> tuple[Product, Product]:
    """For layers that are one product: of the first, which computes it, and of the others, each called once in turn."""
    waiting: list[torch.Tensor] = []

    def first(states: torch.Tensor) -> torch.Tensor:
        own, *waiting[:] = product(states).split(sizes, -1)
        return own

    return first, lambda states: waiting.pop(0)


@torch.no_grad()
def sample_images(
    model: JanusForConditionalGeneration,
    ids: torch.Tensor,
    mask: torch.Tensor,
    seeds: Sequence[int],
    length: int,
    sampling: Sampling,
) -> TokenTraj:
    """Draw `length` image tokens for each seed.

    Args:
        ids, mask: int64 [P, T] prompts; with guidance [2P, T], the unconditional prompts second.
        seeds: one per sample, the G = len(seeds) / P samples of a prompt together.
    """
    guidance = sampling.guidance_scale != 1
    repeats = len(seeds) // (len(ids) // 2 if guidance else len(ids))
    uniforms = uniform_streams(seeds, length, ids.device)
    embeddings = model.get_input_embeddings()(ids)
    rows = torch.arange(len(ids), device=ids.device).repeat_interleave(repeats)
    decoder = PrefixDecoder(model.model.language_model, embeddings, mask, rows, length - 1)
    actions = torch.empty(len(seeds), length, dtype=torch.long, device=ids.device)
    log_probs = torch.empty(len(seeds), length, device=ids.device)
    inner = model.model
    parts = [inner.language_model, inner.generation_head, inner.generation_aligner]
    with torch.inference_mode(), packed_linears(parts, len(rows)):  # spares what autograd notes of every tensor
        for i in range(length):
            if i:
                token = actions[:, i - 1 : i].repeat(2 if guidance else 1, 1)
                decoder.step(model.prepare_embeddings_for_image_generation(token))
            logits = guided(inner.generation_head(decoder.hidden), sampling)
            actions[:, i] = inverse_cdf(logits, uniforms[:, i])
            log_probs[:, i] = Categorical(logits).log_prob(actions[:, i])
    return TokenTraj(actions, log_probs)
