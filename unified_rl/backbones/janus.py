"""Janus and Janus-Pro on transformers' own modules: loading, drawing, reading, and what of it is trained.

A public checkpoint in Hugging Face layout (`deepseek-community/Janus-Pro-1B`) and the tiny one of this package take
the same path. The model stays in eval mode, also in training: it has no dropout, and the image tokenizer must not
leave eval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import JanusConfig, JanusProcessor
from transformers.integrations import HfDeepSpeedConfig

from unified_rl.backbones.base import (
    BackboneError,
    Categorical,
    Sampling,
    TextScore,
    TextTraj,
    TokenTraj,
    check_text_sampling,
    choose_attention,
    embedding,
    images_repeat,
    sampled_text,
)
from unified_rl.backbones.janus_inputs import JanusInputs
from unified_rl.backbones.janus_sampling import PrefixDecoder, guided, positions_of, sample_images
from unified_rl.backbones.trained import TrainedWeights

LORA_TARGETS = (
    r"model\.language_model\.layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj))"
)
TRAINED_IN_FULL = (
    "model.language_model.layers.",
    "model.language_model.norm.",
    "model.generation_embeddings.",
    "model.generation_aligner.",
    "model.generation_head.",
)
RECOMPUTED = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
VQ_BATCH = 32  # images decoded together; bounds the memory of the full-resolution feature maps


class JanusForConditionalGeneration(transformers.JanusForConditionalGeneration):
    """transformers' class with the image tokenizer kept in fp32 whatever the model's dtype."""

    _keep_in_fp32_modules_strict = ("vqmodel",)


class JanusBackbone(TrainedWeights):
    """The backbone interface over one Janus; see `from_pretrained`.

    Attributes:
        model: in eval mode, no parameter requires a gradient until the caller says so.
        image_tokens: S, tokens of an image.
        image_size: pixels of its side.
        grid: rows and columns of an image's tokens.
    """

    family = "janus"
    sampling_type = Sampling
    lora_targets = reading_lora_targets = LORA_TARGETS  # the same weights draw and read

    def __init__(self, model: JanusForConditionalGeneration, processor: JanusProcessor, path: str = "") -> None:
        super().__init__(model.eval().requires_grad_(False), path)
        self.processor = processor
        self.tokenizer = processor.tokenizer
        vision = model.config.vision_config
        self.image_size: int = vision.image_size
        self.grid = (vision.image_size // vision.patch_size,) * 2
        self.image_tokens: int = self.grid[0] ** 2
        self.inputs = JanusInputs(processor, model.device)
        self.deepspeed_config: HfDeepSpeedConfig | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where inputs go."""
        return self.inputs.device

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attn_implementation: str = "auto",
        ds_config: dict | None = None,
    ) -> JanusBackbone:
        """Load a checkpoint folder in Hugging Face layout.

        Args:
            attn_implementation: `auto` takes flash_attention_2 where it can run, else sdpa.
            ds_config: a DeepSpeed ZeRO-3 configuration; weights are then partitioned over the ranks while they are
                read, and only `image_dist`, `cell_losses`, `answer_logits`, `text_logps` with gradients and the
                rollouts work on them.

        Raises:
            BackboneError: not a Janus in that layout, or weights missing from it.
        """
        folder = Path(path)
        check_layout(folder)
        # transformers ties the text head to the token embeddings unless the file says otherwise, and parts them again
        # where their values differ. It sees that of whole weights only: partitioned ones all look alike.
        config = JanusConfig.from_pretrained(folder, local_files_only=True, tie_word_embeddings=False)
        # transformers asks for the newest HfDeepSpeedConfig through a weak reference: it must outlive the loading.
        partitioned = HfDeepSpeedConfig(ds_config) if ds_config is not None else None
        model, loading = JanusForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=choose_attention(attn_implementation, torch.device(device), dtype),
            local_files_only=True,
            output_loading_info=True,
        )
        wrong = sorted(str(name) for kind in ("missing_keys", "mismatched_keys") for name in loading[kind])
        if wrong:
            raise BackboneError(f"{folder}: weights missing or of another shape: {', '.join(wrong[:5])}")
        if partitioned is None:
            model.to(device)
        backbone = cls(model, JanusProcessor.from_pretrained(folder, local_files_only=True), str(folder))
        backbone.deepspeed_config = partitioned
        backbone.inputs.device = torch.device(device)
        return backbone

    # ---- what is trained ------------------------------------------------------------------------------------------

    @staticmethod
    def trained_in_full(name: str) -> bool:
        """Language model layers and norm, image embeddings, their aligner and the image head.

        Token embeddings, text head, vision tower and image tokenizer are never trained: they are what reads.
        """
        return name.startswith(TRAINED_IN_FULL)

    def frozen_modules(self) -> list[nn.Module]:
        """Modules that drawing and its training do not run: image tokenizer, vision tower and aligner, text head."""
        inner = self.model.model
        return [inner.vqmodel, inner.vision_model, inner.aligner, self.model.lm_head]

    def frozen_when_reading(self) -> list[nn.Module]:
        """Modules that `answer_logits` does not run: image tokenizer, and the drawn tokens' way in and out."""
        inner = self.model.model
        return [inner.vqmodel, inner.generation_embeddings, inner.generation_aligner, inner.generation_head]

    def enable_activation_checkpointing(self, share: float = 1.0) -> None:
        """See `recompute_layers`; with a share above 0, rollouts are refused from then on."""
        self.recompute_layers(self.model, share)

    @staticmethod
    def recompute_layers(model: nn.Module, share: float) -> None:
        """Let the backward pass of a Janus's language model run some of it again: less memory, the same numbers.

        The first `share` of the layers as a whole, which keep no key-value cache then; of the others norms and gates, a
        third of what is kept and hardly any time.
        """
        layers = model.model.language_model.layers
        whole = math.ceil(share * len(layers))
        if whole:
            model.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
        for layer in layers[:whole]:
            layer.training = True  # of the layer alone: transformers checkpoints only layers in training mode
        for layer in layers[whole:]:
            layer.mlp.forward = partial(_feed_forward, layer.mlp)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.forward = partial(RECOMPUTED, norm.forward)

    def save_checkpoint(self, folder: Path) -> None:
        """Write the whole model as a checkpoint folder; adapters have to be merged before."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    # ---- drawing --------------------------------------------------------------------------------------------------

    def rollout_images(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sampling, plans: Sequence[str] | None = None
    ) -> TokenTraj:
        """Draw G images per prompt; the actions of a sample depend on its prompt and seed only.

        Args:
            prompts: P texts.
            seeds: P * G, the G of a prompt together.
        """
        refuse_plans(plans)
        if not prompts or not seeds or len(seeds) % len(prompts):
            raise BackboneError(f"{len(seeds)} seeds do not divide evenly over {len(prompts)} prompts")
        ids, mask = self._branches(prompts, sampling)
        return sample_images(self.model, ids, mask, seeds, self.image_tokens, sampling)

    def _branches(
        self, prompts: Sequence[str], sampling: Sampling, dropped: Sequence[bool] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask [B, T] of drawing prompts; with guidance [2B, T], the unconditional rows second."""
        ids, mask = self.inputs.drawing(prompts)
        unconditional = self.inputs.unconditional(ids)
        if dropped is not None:
            ids = torch.where(torch.tensor(dropped, device=ids.device)[:, None], unconditional, ids)
        if sampling.guidance_scale == 1:
            return ids, mask
        return torch.cat([ids, unconditional]), torch.cat([mask, mask])

    def image_dist(
        self,
        prompts: Sequence[str],
        trajectory: TokenTraj,
        sampling: Sampling,
        steps: Sequence[int] | None = None,
        plans: Sequence[str] | None = None,
        dropped: Sequence[bool] | None = None,
    ) -> Categorical:
        """The distributions that drew the tokens, teacher-forced and differentiable.

        Args:
            prompts: B texts.
            trajectory: of B images; its log-probs are not read.
            steps: only these positions, in this order; default all S.
            dropped: rows whose prompt is hidden as in the unconditional branch (to train guidance).
        """
        refuse_plans(plans)
        actions = trajectory.actions
        if len(prompts) != len(actions) or actions.shape[1] != self.image_tokens:
            raise BackboneError(
                f"actions of shape {list(actions.shape)} do not fit {len(prompts)} prompts x {self.image_tokens} tokens"
            )
        wanted = list(range(self.image_tokens)) if steps is None else list(steps)
        ids, mask = self._branches(prompts, sampling, dropped)
        earlier = actions[:, : max(wanted)].to(ids.device)  # what the last wanted step sees
        drawn = self.model.prepare_embeddings_for_image_generation(earlier) if earlier.shape[1] else None
        embeddings = self.model.get_input_embeddings()(ids)
        if drawn is not None:
            repeated = drawn if len(ids) == len(actions) else torch.cat([drawn, drawn])
            embeddings = torch.cat([embeddings, repeated], 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), earlier.shape[1])], 1)
        hidden = self.model.model.language_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions_of(mask), use_cache=False
        ).last_hidden_state
        first = ids.shape[1] - 1  # this token's output predicts the first image token
        rows = hidden[:, first:] if steps is None else hidden[:, [first + step for step in wanted]]
        return Categorical(guided(self.model.model.generation_head(rows), sampling))

    def cell_losses(
        self,
        prompts: Sequence[str],
        trajectory: TokenTraj,
        seeds: Sequence[int],
        shift: float = 1.0,
        dropped: Sequence[bool] | None = None,
    ) -> torch.Tensor:
        """fp32 [B, S]: cross-entropy in nats of every image token, one for each cell of `grid`; differentiable.

        Args:
            seeds, shift: of the noise that other families need; tokens need none.
            dropped: rows whose prompt is hidden.
        """
        distribution = self.image_dist(prompts, trajectory, Sampling(), dropped=dropped)
        return -distribution.log_prob(trajectory.actions.to(distribution.logits.device))

    @torch.no_grad()
    def decode(self, trajectory: TokenTraj) -> np.ndarray:
        """uint8 [B, H, W, 3] images."""
        parts = [self.model.decode_image_tokens(part) for part in trajectory.actions.to(self.device).split(VQ_BATCH)]
        pixels = torch.cat(parts).float()
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()

    # ---- reading --------------------------------------------------------------------------------------------------

    def text_logps(
        self,
        images: Sequence[np.ndarray | None],
        questions: Sequence[str],
        responses: Sequence[str],
        end_of_turn: bool = False,
    ) -> TextScore:
        """Log-probs of the tokens of `responses` as answers, teacher-forced and differentiable.

        Without gradients, an image that several rows have is read once.

        Args:
            images: uint8 [H, W, 3] or None, one per question.
            end_of_turn: also score the token that ends the answer.
        """
        answer, answer_mask = self.inputs.responses(responses, end_of_turn)
        if torch.is_grad_enabled() or not images_repeat(images):
            logits = self._logits_in_one_pass(images, questions, answer, answer_mask)
        else:
            decoder = self._prompted(images, questions, answer.shape[1])
            before = decoder.hidden[:, None]
            states = decoder.step(self.model.get_input_embeddings()(answer), answer_mask)
            logits = self.model.lm_head(torch.cat([before, states[:, :-1]], 1)).float()
        log_probs = -F.cross_entropy(logits.transpose(1, 2), answer, reduction="none")
        return TextScore(log_probs * answer_mask, answer_mask, answer)

    def answer_logits(
        self, images: Sequence[np.ndarray | None], questions: Sequence[str], ids: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """fp32 [B, T, V] logits at temperature 1 that predict each of the given tokens, differentiable.

        An image that several rows have is read once, unless activations are recomputed, which excludes a cache. Rows
        without common images take the same two passes, so that all ranks of ZeRO-3 run the same modules.

        Args:
            ids: int64 [B, T] as `rollout_text` sampled them; mask: [B, T], 1 at tokens, with padding on the right,
                where the logits mean nothing.
        """
        recomputes = any(layer.training for layer in self.model.model.language_model.layers)
        if recomputes or any(image is None for image in images):
            return self._logits_in_one_pass(images, questions, ids, mask)
        starts, pixels, rows, prompts, prompt_mask = self.inputs.shared_reading(images, questions)
        whole, whole_mask = _before_last(prompts, prompt_mask, ids, mask)
        decoder = self._shared(starts, pixels, rows, whole.shape[1])
        hidden = decoder.step(self.model.get_input_embeddings()(whole), whole_mask)
        return self.model.lm_head(hidden[:, prompts.shape[1] - 1 :].contiguous()).float()  # of a slice: row by row

    def _logits_in_one_pass(
        self, images: Sequence[np.ndarray | None], questions: Sequence[str], ids: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """As `answer_logits`, with every row's image read for itself."""
        prompts, prompt_mask, pixels = self.inputs.reading(images, questions)
        whole, whole_mask = _before_last(prompts, prompt_mask, ids, mask)
        hidden = self.model.model(
            input_ids=whole,
            pixel_values=None if pixels is None else pixels.to(self.model.dtype),
            attention_mask=whole_mask,
            position_ids=positions_of(whole_mask),
            use_cache=False,
        ).last_hidden_state
        return self.model.lm_head(hidden[:, prompts.shape[1] - 1 :].contiguous()).float()  # of a slice: row by row

    def rollout_text(
        self,
        images: Sequence[np.ndarray | None],
        questions: Sequence[str],
        seeds: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        system: str = "",
        top_p: float = 1.0,
    ) -> TextTraj:
        """Answer each question; temperature 0 is greedy, otherwise a sample depends on its own seed only.

        An image that several questions have is read once.

        Args:
            top_p: only the nucleus of that much probability is sampled from; log-probs and entropies stay those of the
                whole distribution at this temperature.
        """
        if system:
            raise BackboneError("Janus knows no system text; leave think mode off (reward.srum.think=false)")
        check_text_sampling(len(questions), seeds, max_new_tokens, temperature, top_p)
        decoder = self._prompted(images, questions, max_new_tokens - 1)
        end, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id

        def next_logits(token: torch.Tensor | None) -> torch.Tensor:
            if token is not None:
                decoder.step(self.model.get_input_embeddings()(token[:, None]))
            return self.model.lm_head(decoder.hidden)

        sampled = sampled_text(next_logits, seeds, max_new_tokens, temperature, top_p, end, pad, self.device)
        return TextTraj(*sampled, texts=self.inputs.texts(sampled[0]))

    @torch.no_grad()
    def embed(self, images: Sequence[np.ndarray | None], texts: Sequence[str]) -> torch.Tensor:
        """fp32 [B, D] of unit length: mean of the last hidden states of each text's tokens, read as the model's answer.

        Args:
            images: uint8 [H, W, 3] that the texts speak of, or None; with one text for all, an embedding of the image.
        """
        ids, mask = self.inputs.responses(texts, end_of_turn=False)
        decoder = self._prompted(images, [""] * len(texts), ids.shape[1])
        return embedding(decoder.step(self.model.get_input_embeddings()(ids), mask), mask)

    @torch.no_grad()
    def _prompted(self, images: Sequence[np.ndarray | None], questions: Sequence[str], room: int) -> PrefixDecoder:
        """All questions read, each with room for `room` tokens behind it; an image that several have is read once."""
        language_model = self.model.model.language_model
        if not images_repeat(images):
            ids, mask, pixels = self.inputs.reading(images, questions)
            rows = torch.arange(len(ids), device=ids.device)
            return PrefixDecoder(language_model, self._reading_embeddings(ids, pixels), mask, rows, room)
        starts, pixels, rows, ids, mask = self.inputs.shared_reading(images, questions)
        decoder = self._shared(starts, pixels, rows, ids.shape[1] + room)
        decoder.step(self.model.get_input_embeddings()(ids), mask)
        return decoder

    def _shared(self, starts: torch.Tensor, pixels: torch.Tensor, rows: torch.Tensor, room: int) -> PrefixDecoder:
        """After images ended by `starts` [D, T]; row i continues number rows[i], see `shared_reading`."""
        embeddings = self._reading_embeddings(starts, pixels)
        return PrefixDecoder(self.model.model.language_model, embeddings, torch.ones_like(starts), rows, room)

    def _reading_embeddings(self, ids: torch.Tensor, pixels: torch.Tensor | None) -> torch.Tensor:
        embeddings = self.model.get_input_embeddings()(ids)
        if pixels is None:
            return embeddings
        features = self.model.model.get_image_features(pixels.to(self.model.dtype)).pooler_output
        places = (ids == self.model.config.image_token_id)[..., None].expand_as(embeddings)
        return embeddings.masked_scatter(places, features.to(embeddings.dtype))


def _feed_forward(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """`layer.forward` of a gated feed-forward part that keeps of the gate only what it is made of."""
    made_of = layer.gate_proj(states), layer.up_proj(states)

    def gate(opened: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return layer.act_fn(opened) * up

    gated = RECOMPUTED(gate, *made_of)
    storage = gated.untyped_storage()._cdata  # its identity: `pack` is kept, and would keep a tensor that it speaks of

    def pack(kept: torch.Tensor) -> torch.Tensor | torch.Size:
        return kept.shape if kept.untyped_storage()._cdata == storage else kept

    def unpack(packed: torch.Tensor | torch.Size) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else gate(*(x.detach() for x in made_of)).view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return layer.down_proj(gated)


def _before_last(
    prompts: torch.Tensor, prompt_mask: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts and answers as one sequence without the last answer token, which nobody reads; ids and mask."""
    return torch.cat([prompts, ids[:, :-1].to(prompts)], 1), torch.cat([prompt_mask, mask[:, :-1].to(prompt_mask)], 1)


def refuse_plans(plans: Sequence[str] | None) -> None:
    """Raise when there are plans: Janus draws from the prompt alone."""
    if plans is not None:
        raise BackboneError("Janus cannot draw from a written plan; set rollout.think=false")


def check_layout(folder: Path) -> None:
    """Raise with a remedy when `folder` is not a Janus checkpoint in Hugging Face layout."""
    config = folder / "config.json"
    if not config.is_file():
        raise BackboneError(f"{folder} is not a checkpoint folder: it has no config.json")
    kind = transformers.PretrainedConfig.get_config_dict(folder)[0].get("model_type")
    if kind != "janus":
        hint = (
            "; that is DeepSeek's own layout, take deepseek-community/Janus-Pro-1B or -7B instead"
            if kind == "multi_modality"
            else ""
        )
        raise BackboneError(f"{config}: model_type is {kind!r}, not 'janus'{hint}")
