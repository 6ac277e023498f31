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
from unified_rl.shapes import measure, training
from unified_rl.shapes.ratings import rate_layout, rate_regions
from unified_rl.shapes.tiny_bagel import build_checkpoint, save_model
from unified_rl.shapes.train_vae import build_vae, save_vae, train_vae, true_latents
from unified_rl.shapes.train_vision import PLACES, PROPERTIES, train_vision, word_vectors
from unified_rl.shapes.training import Phase, drawing_batch, optimise, reading_batch

SAMPLING = FlowSampling(steps=8, shift=3.0, guidance_scale=1.0)  # how the drawing is measured
VISION_STEPS = 100
VISION_SHARPNESS = 2.0


@dataclass(frozen=True)
class Settings(training.Settings):
    """Everything that determines the checkpoint."""

    # Regions first: after look-ups a model of this size hardly learns to find the cell that a box names.
    phases: tuple[Phase, ...] = (
        Phase(steps=100, regions=28),
        Phase(steps=200, lookups=36, regions=12),
        Phase(steps=250, questions=24, tables=12, layouts=6, regions=8, scattered=4),
        Phase(steps=1700, drawings=56, captions=6, questions=12, tables=3, layouts=5, regions=6, scattered=3),
    )
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


def reading_loss(
    backbone: BagelBackbone, images: Sequence[np.ndarray], questions: Sequence[str], answers: Sequence[str]
) -> torch.Tensor:
    """Mean negative log-likelihood of the answers' tokens and of their ends, nats."""
    score = backbone.text_logps(images, questions, answers, end_of_turn=True)
    return -(score.log_probs * score.mask).sum() / score.mask.sum()


def losses(backbone: BagelBackbone, settings: Settings, phase: Phase, rng: random.Random) -> dict[str, torch.Tensor]:
    """Errors of drawing, and of answers to questions and to the judge's questions; 0 for what the phase lacks."""
    draw = read = rate = torch.zeros(())
    if phase.drawings:
        draw = drawing_loss(backbone, settings, *drawing_batch(settings, phase.drawings, rng), rng)
    asked = reading_batch(settings, phase, rng)
    if asked[0]:
        read = reading_loss(backbone, *asked)
    made = [rate_layout(rng) for _ in range(phase.layouts)]
    made += [rate_regions(rng, i >= phase.regions) for i in range(phase.regions + phase.scattered)]
    if made:
        columns = zip(*((r.image, r.question, r.answer) for r in made), strict=True)
        rate = settings.rating_weight * reading_loss(backbone, *columns)
    return {"drawing": draw, "reading": read, "rating": rate}


# ---- training -------------------------------------------------------------------------------------------------------


def name_patches(backbone: BagelBackbone, seed: int, log: Callable[[str], None], steps: int = VISION_STEPS) -> None:
    """Teach the vision tower and its connector what patches show, in the language model's word vectors."""
    model, special = backbone.model, backbone.inputs.special

    def features(pixels: torch.Tensor) -> torch.Tensor:
        packed = pack([[Picture(picture)] for picture in pixels], model.config, special)
        return model.connector(model.vit_model(packed.patches, packed.patch_positions, packed.patch_valid))

    parameters = [*model.vit_model.parameters(), *model.connector.parameters()]
    words = model.language_model.model.embed_tokens.weight
    vectors = [word_vectors(words, backbone.tokenizer, names) for names in (*PROPERTIES, *PLACES)]
    train_vision(features, parameters, vectors, seed, log, steps, VISION_SHARPNESS)


def train_joint(backbone: BagelBackbone, settings: Settings, log: Callable[[str], None]) -> None:
    """Run all phases: train everything but the autoencoder and the position tables."""
    rng = random.Random(f"joint-{settings.seed}")
    model = backbone.model.requires_grad_(True)
    for table in (model.vit_pos_embed, model.latent_pos_embed):
        table.requires_grad_(False)

    def check() -> None:
        log(measure.one_line(measure.abilities(backbone, SAMPLING, questions=60, captions=96, samples=1)))
        log(measure.one_line(measure.ratings_of_scenes(backbone, 3, 60)))

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
    report(BagelBackbone.from_pretrained(folder), log)  # rounded, as it will be read


def report(backbone: BagelBackbone, log: Callable[[str], None]) -> None:
    """Log what a trained checkpoint can do."""
    log(measure.one_line(measure.abilities(backbone, SAMPLING)))
    log("rating scenes: " + measure.one_line(measure.ratings_of_scenes(backbone, 7, 600)))
    drawn = measure.judging(backbone, *measure.drawings(backbone, 2, SAMPLING))
    log("rating its own pictures: " + measure.one_line(drawn))


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    return training.main(argv, "unified_rl.shapes.train_bagel", __doc__, Settings(), make)


if __name__ == "__main__":
    raise SystemExit(main())
