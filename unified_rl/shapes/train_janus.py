"""`make tiny-janus`: train the shipped tiny Janus on captions, questions and drawing, from nothing.

The aim is a model that, like the public ones, reads pictures clearly better than it draws them: a share of the
drawing captions is wrong (as on the web), reading captions are right. Every number printed comes from the detector
and from scenes that were not trained on.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch

from unified_rl.backbones.base import Sampling, TokenTraj
from unified_rl.backbones.janus import JanusBackbone
from unified_rl.shapes import training
from unified_rl.shapes.tiny_janus import build_checkpoint
from unified_rl.shapes.train_vision import PLACES, PROPERTIES, STEPS, train_vision, word_vectors
from unified_rl.shapes.train_vq import start_codes_alike, train_vq, true_codes
from unified_rl.shapes.training import Phase, Settings, drawing_batch, optimise, reading_losses


def name_patches(backbone: JanusBackbone, seed: int, log: Callable[[str], None], steps: int = STEPS) -> None:
    """Teach the vision tower and its aligner what patches show, in the language model's word vectors."""
    inner = backbone.model.model
    words = inner.language_model.embed_tokens.weight
    train_vision(
        lambda pixels: inner.aligner(inner.vision_model(pixels).last_hidden_state),
        [*inner.vision_model.parameters(), *inner.aligner.parameters()],
        [word_vectors(words, backbone.tokenizer, names) for names in (*PROPERTIES, *PLACES)],
        seed,
        log,
        steps,
    )


def losses(backbone: JanusBackbone, settings: Settings, phase: Phase, rng: random.Random) -> dict[str, torch.Tensor]:
    """Nats per token of drawn codes (0 without drawings), and of answers to questions and to the judge's questions."""
    draw = torch.zeros(())
    if phase.drawings:
        prompts, pictures, hidden = drawing_batch(settings, phase.drawings, rng)
        codes = true_codes(pictures)
        pictures_drawn = TokenTraj(codes, torch.zeros(codes.shape))
        draw = backbone.cell_losses(prompts, pictures_drawn, [], dropped=hidden).mean()
    return {"drawing": draw, **reading_losses(backbone, settings, phase, rng)}


def train_joint(backbone: JanusBackbone, settings: Settings, log: Callable[[str], None]) -> None:
    """Run all phases: train everything but the image tokenizer."""
    rng = random.Random(f"joint-{settings.seed}")
    model = backbone.model.requires_grad_(True)
    model.model.vqmodel.requires_grad_(False)

    def check() -> None:
        training.report(backbone, Sampling(), log, questions=60, captions=96, samples=1, scenes=60)

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimise(parameters, settings, lambda phase: losses(backbone, settings, phase, rng), check, log)
    model.requires_grad_(False)


def make(folder: Path, settings: Settings, log: Callable[[str], None]) -> None:
    """Train a checkpoint and leave it in `folder` as fp16 safetensors with tokenizer and processor."""
    build_checkpoint(folder, settings.seed)
    backbone = JanusBackbone.from_pretrained(folder)
    inner = backbone.model.model
    train_vq(inner.vqmodel, settings.seed, log)
    start_codes_alike(inner, settings.seed)
    name_patches(backbone, settings.seed, log)
    train_joint(backbone, settings, log)
    backbone.model.half().save_pretrained(folder)
    backbone.processor.save_pretrained(folder)
    training.report(JanusBackbone.from_pretrained(folder), Sampling(), log)  # rounded, as it will be read


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    return training.main(argv, "unified_rl.shapes.train_janus", __doc__, Settings(), make)


if __name__ == "__main__":
    raise SystemExit(main())
