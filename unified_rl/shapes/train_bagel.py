"""`make tiny-bagel`: train the shipped tiny BAGEL on captions, questions, ratings and drawing, from nothing.

As with the tiny Janus, the aim is a model that reads pictures clearly better than it draws them. Every number printed
comes from the detector and from scenes that were not trained on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from unified_rl.backbones.bagel.backbone import BagelBackbone
from unified_rl.backbones.bagel.flow import FlowSampling
from unified_rl.backbones.bagel.sequence import Picture, pack, patchify
from unified_rl.backbones.base import FlowTraj
from unified_rl.shapes import training
from unified_rl.shapes.tiny_bagel import build_checkpoint, save_model
from unified_rl.shapes.train_vae import build_vae, save_vae, train_vae, true_latents
from unified_rl.shapes.train_vision import PLACES, PROPERTIES, STEPS, train_vision, word_vectors
from unified_rl.shapes.training import Phase, drawing_batch, optimise, reading_losses

SAMPLING = FlowSampling(steps=8, shift=3.0, guidance_scale=1.0)  # how the drawing is measured


@dataclass(frozen=True)
class Settings(training.Settings):
    """Everything that determines the checkpoint."""

    phases: tuple[Phase, ...] = (
        Phase(steps=100, regions=28),
        Phase(steps=200, lookups=36, regions=12),
        Phase(steps=250, questions=24, tables=12, proposals=3, tasks=2, layouts=6, regions=8, scattered=4),
        Phase(
            steps=1700, drawings=56, captions=6, questions=12, tables=3, proposals=3, tasks=2, layouts=5, regions=6,
            scattered=3,
        ),
    )  # fmt: skip
    rating_weight: float = 2.0  # most tokens of a rating are its form, which is soon known
    copies: int = 4  # of each drawing, with another noise at another time; they cost less than as many prompts
    shift: float = 2.0  # of the times that drawing is trained at


def drawing_loss(
    backbone: BagelBackbone,
    settings: Settings,
    prompts: Sequence[str],
    pictures: np.ndarray,
    hidden: Sequence[bool],
    rng: random.Random,
) -> torch.Tensor:
    """Mean squared error of the velocity around the exact latents of uint8 [B, H, W, 3] pictures."""
    copies = [i for i in range(len(prompts)) for _ in range(settings.copies)]
    images = patchify(true_latents(pictures), backbone.model.config.latent_patch)[copies]
    none = images.new_zeros(len(images), 0)
    return backbone.cell_losses(
        [prompts[i] for i in copies],
        FlowTraj(images[:, None], none.long(), none, images),
        [rng.getrandbits(32) for _ in copies],
        shift=settings.shift,
        dropped=[hidden[i] for i in copies],
    ).mean()


def losses(backbone: BagelBackbone, settings: Settings, phase: Phase, rng: random.Random) -> dict[str, torch.Tensor]:
    """Errors of drawing (0 without drawings), and of answers to questions and to the judge's questions."""
    draw = torch.zeros(())
    if phase.drawings:
        draw = drawing_loss(backbone, settings, *drawing_batch(settings, phase.drawings, rng), rng)
    return {"drawing": draw, **reading_losses(backbone, settings, phase, rng)}


# ---- training -------------------------------------------------------------------------------------------------------


def name_patches(backbone: BagelBackbone, seed: int, log: Callable[[str], None], steps: int = STEPS) -> None:
    """Teach the vision tower and its connector what patches show, in the language model's word vectors."""
    model, special = backbone.model, backbone.inputs.special

    def features(pixels: torch.Tensor) -> torch.Tensor:
        packed = pack([[Picture(picture)] for picture in pixels], model.config, special)
        return model.connector(model.vit_model(packed.patches, packed.patch_positions, packed.patch_valid))

    parameters = [*model.vit_model.parameters(), *model.connector.parameters()]
    words = model.language_model.model.embed_tokens.weight
    vectors = [word_vectors(words, backbone.tokenizer, names) for names in (*PROPERTIES, *PLACES)]
    train_vision(features, parameters, vectors, seed, log, steps)


def train_joint(backbone: BagelBackbone, settings: Settings, log: Callable[[str], None]) -> None:
    """Run all phases: train everything but the autoencoder and the position tables."""
    rng = random.Random(f"joint-{settings.seed}")
    model = backbone.model.requires_grad_(True)
    for table in (model.vit_pos_embed, model.latent_pos_embed):
        table.requires_grad_(False)

    def check() -> None:
        training.report(backbone, SAMPLING, log, questions=60, captions=96, samples=1, scenes=60)

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimise(parameters, settings, lambda phase: losses(backbone, settings, phase, rng), check, log)
    model.requires_grad_(False)


def make(folder: Path, settings: Settings, log: Callable[[str], None]) -> None:
    """Train a checkpoint and leave it in `folder`, all weights in fp16."""
    build_checkpoint(folder, settings.seed)
    vae = build_vae(settings.seed)
    train_vae(vae, settings.seed, log)
    save_vae(vae, folder)
    backbone = BagelBackbone.from_pretrained(folder)
    name_patches(backbone, settings.seed, log)
    train_joint(backbone, settings, log)
    save_model(backbone.model, folder)
    training.report(BagelBackbone.from_pretrained(folder), SAMPLING, log)  # rounded, as it will be read


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    return training.main(argv, "unified_rl.shapes.train_bagel", __doc__, Settings(), make)


if __name__ == "__main__":
    raise SystemExit(main())
