"""Own sampling loops for Janus: transformers' `generate` has no per-step scores and no per-sample seeds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import DynamicCache, JanusForConditionalGeneration, StaticCache

from unified_rl.backbones.base import Categorical, ImageTraj, Sampling, inverse_cdf, uniform_streams


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """int64 [B, T] position of every token of a left-padded batch; padding gets 0."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


class PrefixDecoder:
    """A language model after a prompt, ready for one token at a time.

    The prompt is run once; its keys and values are then repeated for the samples that continue it. On CUDA they
    move to a static cache, which keeps every step's tensors at the same address and size.

    Args:
        language_model: of the Janus.
        embeddings: [P, T, D] prompts, padded on the left.
        mask: int64 [P, T].
        repeats: samples per prompt; they follow one another in the batch.
        new_tokens: how many steps there will be at most.

    Attributes:
        hidden: [P * repeats, D], the last layer's output after the newest token.
    """

    def __init__(
        self, language_model: nn.Module, embeddings: torch.Tensor, mask: torch.Tensor, repeats: int, new_tokens: int
    ) -> None:
        self.language_model = language_model
        self.length = mask.shape[1]
        positions = positions_of(mask)
        self.cache = DynamicCache(config=language_model.config)
        hidden = language_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        self.hidden = hidden.repeat_interleave(repeats, 0)
        self.position = positions[:, -1:].repeat_interleave(repeats, 0)
        self.static = embeddings.is_cuda
        if self.static:
            self.cache = self._static_copy(repeats, self.length + new_tokens)
        elif repeats > 1:
            self.cache.batch_repeat_interleave(repeats)
        self.visible = self._visible(mask.repeat_interleave(repeats, 0), new_tokens)

    def _static_copy(self, repeats: int, length: int) -> StaticCache:
        static = StaticCache(config=self.language_model.config, max_cache_len=length)
        for index, layer in enumerate(self.cache.layers):
            keys, values = (x.repeat_interleave(repeats, 0) for x in (layer.keys, layer.values))
            static.update(keys, values, index)
        return static

    def _visible(self, mask: torch.Tensor, new_tokens: int) -> torch.Tensor | None:
        """Bool mask [B, ..., T + new_tokens], built once; None where nothing has to be hidden."""
        # A ready-made [B, 1, 1, K] mask spares transformers building one at every step, but only sdpa takes it.
        self.ready_made = self.language_model.config._attn_implementation == "sdpa"
        if self.ready_made and not self.static and bool(mask.all()):
            return None
        future = mask.new_full((len(mask), new_tokens), 0 if self.ready_made and self.static else 1)
        visible = torch.cat([mask, future], 1).bool()
        return visible[:, None, None] if self.ready_made else visible

    def step(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Append one token per row, embeddings [B, 1, D]; returns the new `hidden` [B, D]."""
        self.position = self.position + 1
        self.length += 1
        visible = self.visible
        if visible is not None and self.ready_made and self.static:
            visible[..., self.length - 1] = True
        elif visible is not None:
            visible = visible[..., : self.length]
        self.hidden = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=visible,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        return self.hidden


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
) -> ImageTraj:
    """Draw `length` image tokens for each seed.

    Args:
        ids, mask: int64 [P, T] prompts; with guidance [2P, T], the unconditional prompts second.
        seeds: one per sample, the G = len(seeds) / P samples of a prompt together.
    """
    guidance = sampling.guidance_scale != 1
    repeats = len(seeds) // (len(ids) // 2 if guidance else len(ids))
    uniforms = uniform_streams(seeds, length, ids.device)
    embeddings = model.get_input_embeddings()(ids)
    decoder = PrefixDecoder(model.model.language_model, embeddings, mask, repeats, length - 1)
    actions = torch.empty(len(seeds), length, dtype=torch.long, device=ids.device)
    log_probs = torch.empty(len(seeds), length, device=ids.device)
    for i in range(length):
        if i:
            token = actions[:, i - 1 : i]
            decoder.step(model.prepare_embeddings_for_image_generation(torch.cat([token, token]) if guidance else token))
        logits = guided(model.model.generation_head(decoder.hidden), sampling)
        actions[:, i] = inverse_cdf(logits, uniforms[:, i])
        log_probs[:, i] = Categorical(logits).log_prob(actions[:, i])
    return ImageTraj(actions, log_probs, torch.ones_like(log_probs))


@torch.no_grad()
def sample_text(
    model: JanusForConditionalGeneration,
    embeddings: torch.Tensor,
    mask: torch.Tensor,
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    end: int,
    pad: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Continue each prompt until the token `end` or `max_new_tokens`.

    Args:
        embeddings: [B, T, D]; mask: int64 [B, T].
        temperature: 0 takes the likeliest token.

    Returns:
        ids int64, log_probs, entropies, mask fp32: [B, T'] each; see `TextTraj`.
    """
    device = embeddings.device
    uniforms = uniform_streams(seeds, max_new_tokens, device)
    decoder = PrefixDecoder(model.model.language_model, embeddings, mask, 1, max_new_tokens - 1)
    running = torch.ones(len(mask), dtype=torch.bool, device=device)
    columns = []
    for i in range(max_new_tokens):
        if i:
            decoder.step(model.get_input_embeddings()(columns[-1][0][:, None]))
        logits = model.lm_head(decoder.hidden).float() / (temperature or 1.0)
        token = inverse_cdf(logits, uniforms[:, i]) if temperature else logits.argmax(-1)
        step = Categorical(logits)
        log_prob, entropy = step.log_prob(token) * running, step.entropy() * running
        columns.append((token.masked_fill(~running, pad), log_prob, entropy, running.float()))
        running = running & (token != end)
        if not running.any():
            break
    return tuple(torch.stack(values, 1) for values in zip(*columns, strict=True))
