"""Own sampling loops for Janus: transformers' `generate` has no per-step scores and no per-sample seeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, JanusForConditionalGeneration, StaticCache

from unified_rl.backbones.base import (
    BackboneError,
    Categorical,
    Sampling,
    TokenTraj,
    inverse_cdf,
    next_token,
    uniform_streams,
)


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """int64 [B, T] position of every token of a left-padded batch; padding gets 0."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


class PrefixDecoder:
    """A language model after a prompt, ready for one token at a time.

    The prompt is run once; its keys and values are then copied, once for every row that continues it, into a static
    cache. On a GPU that keeps every step's tensors at the same address and size; on a CPU it is several times
    faster than a growing cache, which copies all keys and values at every step.

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
        self.cache = StaticCache(config=language_model.config, max_cache_len=self.length + new_tokens)
        for index, layer in enumerate(prompt.layers):
            self.cache.update(layer.keys[stored], layer.values[stored], index)
        # Tokens that may be seen, bool [B, T + new_tokens]; grows with every step.
        self.visible = F.pad(seen, (0, new_tokens))
        # A ready-made [B, 1, L, K] mask spares transformers building one at every step, but only sdpa takes it.
        self.ready_made = language_model.config._attn_implementation == "sdpa"

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
        if count == 1:
            return self.visible[:, None, None]
        columns = torch.arange(self.visible.shape[1], device=self.visible.device)
        own = torch.arange(self.length - count, self.length, device=columns.device)[:, None]
        # A padded token sees itself: a row of nothing but padding would have no softmax.
        return (self.visible[:, None, None] & (columns <= own)) | (columns == own)


def guided(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """fp32 logits of the sampled distribution.

    Args:
        logits: [B, ...] of the conditional branch; with guidance [2B, ...], the unconditional rows second.
    """
    logits = logits.float()
    if sampling.guidance_scale != 1:
        conditional, unconditional = logits.chunk(2)
        logits = unconditional + sampling.guidance_scale * (conditional - unconditional)
    return logits / sampling.temperature


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
    for i in range(length):
        if i:
            token = actions[:, i - 1 : i].repeat(2 if guidance else 1, 1)
            decoder.step(model.prepare_embeddings_for_image_generation(token))
        logits = guided(model.model.generation_head(decoder.hidden), sampling)
        actions[:, i] = inverse_cdf(logits, uniforms[:, i])
        log_probs[:, i] = Categorical(logits).log_prob(actions[:, i])
    return TokenTraj(actions, log_probs)


@torch.no_grad()
def sample_text(
    model: JanusForConditionalGeneration,
    decoder: PrefixDecoder,
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    end: int,
    pad: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Continue each row of a decoder until the token `end` or `max_new_tokens`.

    Args:
        decoder: with room for `max_new_tokens` - 1.
        temperature: 0 takes the likeliest token.
        top_p: only the nucleus of that much probability is sampled from.

    Returns:
        ids int64, log_probs, entropies, mask fp32: [B, T'] each; see `TextTraj`.
    """
    device = decoder.hidden.device
    uniforms = uniform_streams(seeds, max_new_tokens, device)
    running = torch.ones(len(seeds), dtype=torch.bool, device=device)
    columns = []
    for i in range(max_new_tokens):
        if i:
            decoder.step(model.get_input_embeddings()(columns[-1][0][:, None]))
        logits = model.lm_head(decoder.hidden).float() / (temperature or 1.0)
        token = next_token(logits, uniforms[:, i], temperature, top_p)
        step = Categorical(logits)
        log_prob, entropy = step.log_prob(token) * running, step.entropy() * running
        columns.append((token.masked_fill(~running, pad), log_prob, entropy, running.float()))
        running = running & (token != end)
        if not running.any():
            break
    return tuple(torch.stack(values, 1) for values in zip(*columns, strict=True))
