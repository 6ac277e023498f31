"""`make tiny-janus`: train the shipped tiny Janus on captions, questions and drawing, from nothing.

The aim is a model that, like the public ones, reads pictures clearly better than it draws them: a share of the
drawing captions is wrong (as on the web), reading captions are right. Every number printed comes from the detector
and from scenes that were not trained on.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from unified_rl.backbones.base import TokenTraj
from unified_rl.backbones.janus import JanusBackbone
from unified_rl.shapes import measure
from unified_rl.shapes.prompts import all_metadata, random_metadata, scene_for
from unified_rl.shapes.questions import LOOKUPS, TABLES, make_question, make_table
from unified_rl.shapes.tiny_janus import DESCRIBE, build_checkpoint
from unified_rl.shapes.train_vision import train_vision
from unified_rl.shapes.train_vq import start_codes_alike, train_vq, true_codes
from unified_rl.shapes.world import render


@dataclass(frozen=True)
class Phase:
    """A stretch of joint training: how many steps, and what each of them holds."""

    steps: int
    drawings: int = 0
    captions: int = 0
    questions: int = 0
    tables: int = 0
    lookups: int = 0


@dataclass(frozen=True)
class Settings:
    """Everything that determines the checkpoint."""

    seed: int = 0
    learning_rate: float = 1.0e-3
    warmup: int = 40  # steps
    decay: float = 0.6  # share of all steps, at the end, over which the rate falls to zero
    # Single look-ups first, then single questions, which build on them; then drawing, by a model that reads.
    phases: tuple[Phase, ...] = (
        Phase(steps=150, lookups=48),
        Phase(steps=350, questions=32, tables=16),
        Phase(steps=1500, drawings=52, captions=8, questions=16, tables=4),
    )
    wrong_drawing_captions: float = 0.25  # share of drawings whose caption belongs to another picture, as on the web
    hidden_drawing_captions: float = 0.1  # for classifier-free guidance
    # How often each category is drawn; colours are learnt last.
    category_weights: tuple[tuple[str, float], ...] = (
        ("single_object", 0.5),
        ("two_object", 1.0),
        ("counting", 1.0),
        ("colors", 2.0),
        ("position", 1.5),
        ("color_attr", 2.0),
    )
    # How often each family is asked; the hard ones rarely, so that reading leaves room for gains and losses.
    family_weights: tuple[tuple[str, float], ...] = (
        ("existence", 1.0),
        ("color", 0.8),
        ("shape", 0.8),
        ("counting", 0.4),
        ("relation", 0.6),
        ("comparison", 0.4),
    )


def drawing_batch(settings: Settings, count: int, rng: random.Random) -> tuple[list[str], np.ndarray, list[bool]]:
    """Prompts, uint8 [B, H, W, 3] pictures, and which prompts are hidden; a share of the prompts is wrong."""
    categories, weights = zip(*settings.category_weights, strict=True)
    metadata = [rng.choice(all_metadata()[tag]) for tag in rng.choices(categories, weights, k=count)]
    images = np.stack([render(scene_for(m, rng)) for m in metadata])
    wrong = [rng.random() < settings.wrong_drawing_captions for _ in metadata]
    prompts = [(random_metadata(rng) if w else m)["prompt"] for w, m in zip(wrong, metadata, strict=True)]
    return prompts, images, [rng.random() < settings.hidden_drawing_captions for _ in metadata]


def reading_batch(
    settings: Settings, phase: Phase, rng: random.Random
) -> tuple[list[np.ndarray], list[str], list[str]]:
    """Pictures, questions and answers: captions first, then questions, then tables and look-ups."""
    families, weights = zip(*settings.family_weights, strict=True)
    images, questions, answers = [], [], []
    for _ in range(phase.captions):
        metadata = random_metadata(rng)
        images.append(render(scene_for(metadata, rng)))
        questions.append(DESCRIBE)
        answers.append(metadata["prompt"])
    asked_questions = [make_question(family, rng) for family in rng.choices(families, weights, k=phase.questions)]
    asked_questions += [make_table(rng, TABLES) for _ in range(phase.tables)]
    asked_questions += [make_table(rng, LOOKUPS) for _ in range(phase.lookups)]
    for asked in asked_questions:
        images.append(render(asked.scene))
        questions.append(asked.question)
        answers.append(asked.answer)
    return images, questions, answers


def losses(
    backbone: JanusBackbone, settings: Settings, phase: Phase, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean negative log-likelihoods (nats per token) of drawn codes (0 without drawings) and of written answers."""
    draw = torch.zeros(())
    if phase.drawings:
        prompts, pictures, hidden = drawing_batch(settings, phase.drawings, rng)
        codes = true_codes(pictures)
        pictures_drawn = TokenTraj(codes, torch.zeros(codes.shape))
        draw = backbone.cell_losses(prompts, pictures_drawn, [], dropped=hidden).mean()
    score = backbone.text_logps(*reading_batch(settings, phase, rng), end_of_turn=True)
    return draw, -(score.log_probs * score.mask).sum() / score.mask.sum()


def learning_rate(settings: Settings, step: int, total: int) -> float:
    """Rate at `step` (from 1) of `total`: linear warm-up, constant, linear decay to zero."""
    left = (total - step) / (settings.decay * total)
    return settings.learning_rate * min(1.0, step / settings.warmup, left)


def train_joint(backbone: JanusBackbone, settings: Settings, log: Callable[[str], None]) -> None:
    """Run all phases: train everything but the image tokenizer."""
    rng = random.Random(f"joint-{settings.seed}")
    model = backbone.model.requires_grad_(True)
    model.model.vqmodel.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    plan = [phase for phase in settings.phases for _ in range(phase.steps)]
    for step, phase in enumerate(plan, 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, len(plan))
        draw, read = losses(backbone, settings, phase, rng)
        optimizer.zero_grad(set_to_none=True)
        (draw + read).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0:
            log(f"joint step {step}/{len(plan)} drawing {draw.item():.3f} reading {read.item():.3f}")
        if step % 250 == 0 and step < len(plan):
            log(measure.one_line(measure.abilities(backbone, questions=60, captions=96, samples=1)))
    model.requires_grad_(False)


def make(folder: Path, settings: Settings, log: Callable[[str], None]) -> None:
    """Train a checkpoint and leave it in `folder` as fp16 safetensors with tokenizer and processor."""
    build_checkpoint(folder, settings.seed)
    backbone = JanusBackbone.from_pretrained(folder)
    inner = backbone.model.model
    train_vq(inner.vqmodel, settings.seed, log)
    start_codes_alike(inner, settings.seed)
    train_vision(inner, backbone.tokenizer, settings.seed, log)
    train_joint(backbone, settings, log)
    backbone.model.half().save_pretrained(folder)
    backbone.processor.save_pretrained(folder)
    log(measure.one_line(measure.abilities(JanusBackbone.from_pretrained(folder))))  # rounded, as it will be read


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m unified_rl.shapes.train_janus",
        description=__doc__,
        epilog="example: python -m unified_rl.shapes.train_janus --out /tmp/tiny-janus --threads 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (part of the result)")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    start = time.monotonic()
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        print(f"{time.monotonic() - start:7.0f} s  {line}", file=sys.stderr, flush=True)

    settings = Settings(seed=arguments.seed)
    log(repr(settings))
    # Made elsewhere and copied at the end: a run that is interrupted leaves the old checkpoint whole.
    with tempfile.TemporaryDirectory() as work:
        make(Path(work), settings, log)
        arguments.out.mkdir(parents=True, exist_ok=True)
        for file in Path(work).iterdir():
            shutil.copyfile(file, arguments.out / file.name)
    (arguments.out / "training.log").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
