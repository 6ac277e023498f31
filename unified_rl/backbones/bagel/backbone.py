"""BAGEL behind the backbone interface: loading, drawing, reading, and what of it is trained.

A public checkpoint (`ByteDance-Seed/BAGEL-7B-MoT`) and the tiny one of this package take the same path. Only the
experts that draw are trained; what reads, and with it every prompt's context, stays as it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from unified_rl.backbones.bagel import loading
from unified_rl.backbones.bagel.context import Context
from unified_rl.backbones.bagel.drawing import Painter
from unified_rl.backbones.bagel.flow import FlowSampling, Gaussian
from unified_rl.backbones.bagel.inputs import SETTINGS, BagelInputs, InputSettings
from unified_rl.backbones.bagel.model import BagelModel
from unified_rl.backbones.bagel.sequence import Segment, Text, pack, unpatchify
from unified_rl.backbones.bagel.vae import FluxVae
from unified_rl.backbones.bagel.writing import answer_logits, sample_text, score_text
from unified_rl.backbones.base import (
    BackboneError,
    FlowTraj,
    TextScore,
    TextTraj,
    check_text_sampling,
    distinct_images,
    embedding,
    images_repeat,
)
from unified_rl.backbones.trained import TrainedWeights

DRAWING_MODULES = ("vae2llm.", "llm2vae.", "time_embedder.")
LORA_TARGETS = (
    r"language_model\.model\.layers\.\d+\."
    r"(self_attn\.(q|k|v|o)_proj_moe_gen|mlp_moe_gen\.(gate_proj|up_proj|down_proj))"
)
READING_LORA_TARGETS = LORA_TARGETS.replace("_moe_gen", "")  # the experts that read, a drawing's prompt as well


class BagelBackbone(TrainedWeights):
    """The backbone interface over one BAGEL; see `from_pretrained`.

    Attributes:
        model: in eval mode, no parameter requires a gradient until the caller says so.
        vae: apart from the model, fp32, never trained.
        image_size: height and width in pixels of a drawn image.
        grid: its rows and columns of latent tokens, the cells.
    """

    family = "bagel"
    sampling_type = FlowSampling
    lora_targets = LORA_TARGETS
    reading_lora_targets = READING_LORA_TARGETS

    def __init__(
        self,
        model: BagelModel,
        vae: FluxVae,
        tokenizer: PreTrainedTokenizerBase,
        settings: InputSettings,
        device: torch.device,
        path: str = "",
    ) -> None:
        super().__init__(model.eval().requires_grad_(False), path)
        self.vae = vae
        self.tokenizer = tokenizer
        self.device = device
        vision = model.config.vision
        self.inputs = BagelInputs(tokenizer, settings, vision.patch, vision.side, device)
        self.image_size = settings.drawn
        self.grid = _grid(model, vae, settings)
        self.painter = Painter(model, self.inputs.special, *self.grid, device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attn_implementation: str = "auto",
        ds_config: dict | None = None,
    ) -> BagelBackbone:
        """Load a checkpoint folder in the public layout.

        Args:
            attn_implementation: `auto` takes flash_attention_2 where it can run, else sdpa.
            ds_config: a DeepSpeed ZeRO-3 configuration; weights are then partitioned over the ranks while they are
                read, and only `image_dist`, `cell_losses` and `answer_logits` work on them.

        Raises:
            BackboneError: the folder is incomplete or its parts do not fit together.
        """
        folder, device = Path(path), torch.device(device)
        model = loading.load_model(folder, dtype, device, attn_implementation, ds_config)
        vae = FluxVae.from_folder(folder, device)
        return cls(model, vae, _tokenizer(folder), InputSettings.from_folder(folder), device, str(folder))

    # ---- what is trained ------------------------------------------------------------------------------------------

    @staticmethod
    def trained_in_full(name: str) -> bool:
        """The experts that draw, the way of latents into the language model and out of it, and the flow's time."""
        return "_moe_gen" in name or name.startswith(DRAWING_MODULES)

    def frozen_modules(self) -> list[nn.Module]:
        """Modules that drawing and its training do not run: vision tower, its way into the language model, text head.

        The image autoencoder is no part of `model`.
        """
        model = self.model
        return [model.vit_model, model.connector, model.vit_pos_embed, model.language_model.lm_head]

    def frozen_when_reading(self) -> list[nn.Module]:
        """Modules that `answer_logits` does not run: the experts that draw, the latents' way in and out, their time."""
        model = self.model
        experts = [m for name, m in model.language_model.named_modules() if name.endswith("_moe_gen")]
        return [model.vae2llm, model.llm2vae, model.time_embedder, model.latent_pos_embed, *experts]

    def enable_activation_checkpointing(self, share: float = 1.0) -> None:
        """Recompute a share of the language model's layers in the backward pass; rollouts are as before."""
        self.model.enable_activation_checkpointing(share)

    def save_checkpoint(self, folder: Path) -> None:
        """Write the whole model as a checkpoint folder; adapters have to be merged before.

        All files but the language model's weights are those of the checkpoint that was loaded.
        """
        if any("lora_" in name for name, _ in self.model.named_parameters()):
            raise BackboneError("the model carries a LoRA adapter; merge it before the checkpoint is written")
        folder.mkdir(parents=True, exist_ok=True)
        replaced = {loading.INDEX, *(file.name for file in loading.Weights.from_folder(Path(self.path)).files)}
        for file in Path(self.path).iterdir():
            if file.is_file() and file.name not in replaced:
                shutil.copy2(file, folder / file.name)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        save_file(tensors, folder / loading.WEIGHTS, metadata={"format": "pt"})

    # ---- drawing --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rollout_images(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampling: FlowSampling,
        plans: Sequence[str] | None = None,
    ) -> FlowTraj:
        """Draw G images per prompt.

        An image depends on its prompt, plan and seed only, up to the last bits; where the SDE's window lies depends on
        the first seed of its group.

        Args:
            prompts: P texts.
            seeds: P * G, the G of a prompt together.
            plans: one per image, what was planned before it is drawn; see `write_plans`.
        """
        if not prompts or not seeds or len(seeds) % len(prompts):
            raise BackboneError(f"{len(seeds)} seeds do not divide evenly over {len(prompts)} prompts")
        size = len(seeds) // len(prompts)
        context = self._contexts([prompt for prompt in prompts for _ in range(size)], plans)
        starts = [sampling.window_start(seeds[row - row % size]) for row in range(len(seeds))]
        return self.painter.draw(context, seeds, starts, sampling)

    def _contexts(
        self, prompts: Sequence[str], plans: Sequence[str] | None, dropped: Sequence[bool] | None = None
    ) -> Context:
        """Context of each of B images; prompts that repeat are read once, in one pass whatever the data."""
        for name, given in (("plans", plans), ("dropped", dropped)):
            if given is not None and len(given) != len(prompts):
                raise BackboneError(f"{len(given)} {name} for {len(prompts)} images")
        keys = list(zip(prompts, [None] * len(prompts) if plans is None else plans, strict=True))
        places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
        # Not even looked for without gradients. An adapter that reads belongs to another role, which does not act here.
        reads = torch.is_grad_enabled() and any(
            p.requires_grad and not self.trained_in_full(name) for name, p in self.model.named_parameters()
        )
        with torch.set_grad_enabled(reads):
            context = self._read([self.inputs.drawing(*key) for key in places])
        context = context.take([places[key] for key in keys])
        return context if dropped is None else context.hide(dropped)

    def _read(self, rows: Sequence[Sequence[Segment]], context: Context | None = None) -> Context:
        """The context behind these segments of each row, which stand behind `context` where one is given."""
        context = Context.empty(len(rows)) if context is None else context
        packed = pack(rows, self.model.config, self.inputs.special, context.next_position)
        return self.model(packed.to(self.device), context)[1]

    def _questions(self, images: Sequence[np.ndarray | None], questions: Sequence[str], system: str = "") -> Context:
        """Context of each question; without gradients, an image that several have is read once."""
        if torch.is_grad_enabled() or len(images) != len(questions) or not images_repeat(images):
            return self._read(self.inputs.reading(images, questions, system))
        first, places = distinct_images(images)
        starts = [self.inputs.start(images[row], system, row) for row in first]
        if -1 in places:
            starts.append(self.inputs.start(None, system))
        context = self._read(starts).take([place % len(starts) for place in places])  # -1, no image, is the last
        return self._read([[self.inputs.whole(question)] for question in questions], context)

    def image_dist(
        self,
        prompts: Sequence[str],
        trajectory: FlowTraj,
        sampling: FlowSampling,
        steps: Sequence[int] | None = None,
        plans: Sequence[str] | None = None,
    ) -> Gaussian:
        """The distributions that drew `trajectory`, differentiable.

        Args:
            prompts: B texts.
            steps: only these of the S decisions, by position, in this order; default all.
            plans: one per image, as it was drawn.
        """
        self._check_fit(prompts, trajectory)
        if not trajectory.steps.shape[1]:
            raise BackboneError("images drawn by the ODE have no decisions; draw them with eta above 0")
        wanted = range(trajectory.steps.shape[1]) if steps is None else steps
        return self.painter.distribution(
            self._contexts(prompts, plans), trajectory.to(self.device), sampling, list(wanted)
        )

    def cell_losses(
        self,
        prompts: Sequence[str],
        trajectory: FlowTraj,
        seeds: Sequence[int],
        shift: float = 1.0,
        dropped: Sequence[bool] | None = None,
        plans: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """fp32 [B, N] squared error of the velocity in every cell of the drawn images, differentiable.

        Args:
            seeds: one per image, of its time and noise.
            shift: of the times, see `flow.shifted`.
            dropped: rows whose prompt is hidden, which trains the branch without it.
            plans: one per image, as it was drawn.
        """
        self._check_fit(prompts, trajectory)
        context = self._contexts(prompts, plans, dropped)
        return self.painter.cell_errors(context, trajectory.final.to(self.device), seeds, shift)

    def _check_fit(self, prompts: Sequence[str], trajectory: FlowTraj) -> None:
        shape = trajectory.final.shape
        if tuple(shape) != (len(prompts), *self.painter.shape):
            raise BackboneError(
                f"latents of shape {list(shape)} do not fit {len(prompts)} prompts x {list(self.painter.shape)}"
            )

    @torch.no_grad()
    def decode(self, trajectory: FlowTraj) -> np.ndarray:
        """uint8 [B, H, W, 3] images."""
        latents = unpatchify(trajectory.final.to(self.device), *self.grid, self.model.config.latent_patch)
        pixels = self.vae.decode(latents).permute(0, 2, 3, 1)
        return (pixels * 255).round().to(torch.uint8).cpu().numpy()

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
        answers = self.inputs.responses(responses, end_of_turn)
        if len(questions) != len(answers):
            raise BackboneError(f"{len(answers)} responses to {len(questions)} questions")
        return score_text(self.model, self.inputs.special, self._questions(images, questions), answers, self.device)

    def answer_logits(
        self, images: Sequence[np.ndarray | None], questions: Sequence[str], ids: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """fp32 [B, T, V] logits at temperature 1 that predict each of the given tokens, in one differentiable pass.

        Args:
            ids: int64 [B, T] as `rollout_text` sampled them; mask: [B, T], 1 at tokens, with padding on the right,
                where the logits mean nothing.
        """
        rows = self.inputs.reading(images, questions)
        if len(ids) != len(rows):
            raise BackboneError(f"{len(ids)} answers to {len(rows)} questions")
        return answer_logits(self.model, self.inputs.special, rows, ids, mask, self.device)

    @torch.no_grad()
    def embed(self, images: Sequence[np.ndarray | None], texts: Sequence[str]) -> torch.Tensor:
        """fp32 [B, D] of unit length: mean of the last hidden states of each text's tokens, read as the model's answer.

        Args:
            images: uint8 [H, W, 3] that the texts speak of, or None; with one text for all, an embedding of the image.
        """
        context, answers = self._questions(images, [""] * len(texts)), self.inputs.responses(texts, end_of_turn=False)
        rows = [[Text([self.inputs.special.text_start, *ids])] for ids in answers]
        packed = pack(rows, self.model.config, self.inputs.special, context.next_position).to(self.device)
        states = packed.in_rows(self.model(packed, context)[0].understanding)
        return embedding(states[:, 1:], packed.in_rows(torch.ones_like(packed.ids))[:, 1:] > 0)

    @torch.no_grad()
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
            system: a text in front of everything else.
            top_p: only the nucleus of that much probability is sampled from; log-probs and entropies stay those of the
                whole distribution at this temperature.
        """
        check_text_sampling(len(questions), seeds, max_new_tokens, temperature, top_p)
        return self._write(self._questions(images, questions, system), seeds, max_new_tokens, temperature, top_p)

    @torch.no_grad()
    def write_plans(
        self, prompts: Sequence[str], seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> list[str]:
        """Think before drawing: one plan per prompt and seed, for `rollout_images` and everything that replays it."""
        check_text_sampling(len(prompts), seeds, max_new_tokens, temperature)
        first = self.inputs.whole(self.inputs.settings.think)
        context = self._read([[first, self.inputs.whole(prompt)] for prompt in prompts])
        written = self._write(context, seeds, max_new_tokens, temperature)
        return [self.inputs.without_control(text) for text in written.texts]

    def _write(
        self, context: Context, seeds: Sequence[int], max_new_tokens: int, temperature: float, top_p: float = 1.0
    ) -> TextTraj:
        special = self.inputs.special
        sampled = sample_text(self.model, special, context, seeds, max_new_tokens, temperature, self.device, top_p)
        return TextTraj(*sampled, texts=self.inputs.texts(sampled[0]))


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        # An empty configuration: transformers knows no BAGEL, and would read what it does not understand.
        return AutoTokenizer.from_pretrained(folder, config=PreTrainedConfig(), local_files_only=True)
    except (OSError, ValueError) as error:
        raise BackboneError(f"{folder} has no tokenizer that can be read: {error}") from None


def _grid(model: BagelModel, vae: FluxVae, settings: InputSettings) -> tuple[int, int]:
    """Rows and columns of latent tokens of a drawn image."""
    config = model.config
    pixels = vae.factor * config.latent_patch
    height, width = settings.drawn
    if vae.channels != config.latent_channels:
        raise BackboneError(f"the autoencoder has {vae.channels} channels, the model draws {config.latent_channels}")
    if height % pixels or width % pixels or max(height, width) > pixels * config.latent_side:
        raise BackboneError(
            f"drawn images of {height} x {width} pixels: sides must be multiples of {pixels} up to"
            f" {pixels * config.latent_side}; set `drawn` in {SETTINGS}"
        )
    return height // pixels, width // pixels
