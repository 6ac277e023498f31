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

from unified_rl.backbones.base import Sampling
from unified_rl.backbones.janus import JanusBackbone
from unified_rl.shapes import measure
from unified_rl.shapes.prompts import random_metadata, scene_for
from unified_rl.shapes.questions import LOOKUPS, TABLES, make_question, make_table
from unified_rl.shapes.tiny_janus import DESCRIBE, build_checkpoint
from unified_rl.shapes.train_vision import train_vision
from unified_rl.shapes.train_vq import train_vq
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
    # Single look-ups first, then single questions, which build on them; drawing last, by a model that reads. Each
    # cycle has its own optimizer and learning-rate schedule.
    cycles: tuple[tuple[Phase, ...], ...] = (
        (
            Phase(steps=150, lookups=48),
            Phase(steps=350, questions=32, tables=16),
            Phase(steps=1700, drawings=52, captions=10, questions=20, tables=4),
        ),
        (Phase(steps=500, drawings=60, captions=8, questions=16),),
    )
    wrong_drawing_captions: float = 0.1  # share of drawings whose caption belongs to another picture
    hidden_drawing_captions: float = 0.1  # for classifier-free guidance
    # How often each family is asked; the hard ones rarely, so that reading leaves room for gains and losses.
    family_weights: tuple[tuple[str, float], ...] = (
        ("existence", 1.5),
        ("color", 1.0),
        ("shape", 1.0),
        ("counting", 0.4),
        ("relation", 0.4),
        ("comparison", 0.4),
    )


def drawing_batch(settings: Settings, count: int, rng: random.Random) -> tuple[list[str], np.ndarray, list[bool]]:
    """Prompts, uint8 [B, H, W, 3] pictures, and which prompts are hidden; a share of the prompts is wrong."""
    metadata = [random_metadata(rng) for _ in range(count)]
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
        codes = backbone.encode_image_tokens(pictures)
        draw = -backbone.image_dist(prompts, codes, Sampling(), dropped=hidden).log_prob(codes).mean()
    score = backbone.text_logps(*reading_batch(settings, phase, rng), end_of_turn=True)
    return draw, -(score.log_probs * score.mask).sum() / score.mask.sum()


def learning_rate(settings: Settings, step: int, total: int) -> float:
    """Rate at `step` (from 1) of `total`: linear warm-up, constant, linear decay to zero."""
    left = (total - step) / (settings.decay * total)
    return settings.learning_rate * min(1.0, step / settings.warmup, left)


def train_joint(backbone: JanusBackbone, settings: Settings, cycle: int, log: Callable[[str], None]) -> None:
    """Run the phases of one cycle: train everything but the image tokenizer."""
    rng = random.Random(f"joint-{settings.seed}-{cycle}" if cycle else f"joint-{settings.seed}")
    model = backbone.model.requires_grad_(True)
    model.model.vqmodel.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    plan = [phase for phase in settings.cycles[cycle] for _ in range(phase.steps)]
    for step, phase in enumerate(plan, 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, len(plan))
        draw, read = losses(backbone, settings, phase, rng)
        optimizer.zero_grad(set_to_none=True)
        (draw + read).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0:
            log(f"cycle {cycle} step {step}/{len(plan)} drawing {draw.item():.3f} reading {read.item():.3f}")
        if step % 500 == 0 and step < len(plan):
            log(measure.one_line(measure.abilities(backbone, questions=60, captions=96, samples=1)))
    model.requires_grad_(False)


def train_eyes(backbone: JanusBackbone, settings: Settings, eyes_from: Path | None, log: Callable[[str], None]) -> None:
    """Train image tokenizer, vision tower and aligner, or take them from the checkpoint `eyes_from`."""
    inner = backbone.model.model
    if eyes_from is None:
        train_vq(inner.vqmodel, settings.seed, log)
        train_vision(inner, backbone.tokenizer, settings.seed, log)
        return
    other = JanusBackbone.from_pretrained(eyes_from).model.model
    for name in ("vqmodel", "vision_model", "aligner"):
        getattr(inner, name).load_state_dict(getattr(other, name).state_dict())


def make(
    folder: Path, settings: Settings, eyes_from: Path | None, continue_from: Path | None, log: Callable[[str], None]
) -> None:
    """Train a checkpoint and leave it in `folder` as fp16 safetensors with tokenizer and processor.

    Args:
        continue_from: a checkpoint after the first cycle; only the others are run.
    """
    if continue_from is None:
        build_checkpoint(folder, settings.seed)
        backbone = JanusBackbone.from_pretrained(folder)
        train_eyes(backbone, settings, eyes_from, log)
    else:
        backbone = JanusBackbone.from_pretrained(continue_from)
    for cycle in range(0 if continue_from is None else 1, len(settings.cycles)):
        train_joint(backbone, settings, cycle, log)
        backbone.model.half().save_pretrained(folder)
        backbone.processor.save_pretrained(folder)
        backbone = JanusBackbone.from_pretrained(folder)  # rounded, as it will be read
        log(measure.one_line(measure.abilities(backbone)))


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
    parser.add_argument("--eyes-from", type=Path, help="reuse image tokenizer, tower and aligner of this checkpoint")
    parser.add_argument("--continue-from", type=Path, help="checkpoint after the first cycle; run the others")
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
        make(Path(work), settings, arguments.eyes_from, arguments.continue_from, log)
        arguments.out.mkdir(parents=True, exist_ok=True)
        for file in Path(work).iterdir():
            shutil.copyfile(file, arguments.out / file.name)
    (arguments.out / "training.log").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
