"""What the trainings of the tiny checkpoints share: batches, phases, the loop and the command line."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from unified_rl.backbones.base import ReplaySettings
from unified_rl.backbones.load import Backbone
from unified_rl.runtime import command_parser
from unified_rl.shapes import measure
from unified_rl.shapes.prompts import all_metadata, random_metadata, scene_for
from unified_rl.shapes.proposing import drawing_task, proposal
from unified_rl.shapes.questions import LOOKUPS, TABLES, TAUGHT_FRAMINGS, make_question, make_table
from unified_rl.shapes.ratings import rate_layout, rate_regions
from unified_rl.shapes.vocabulary import DESCRIBE
from unified_rl.shapes.world import render

CHECK_EVERY = 250  # steps


@dataclass(frozen=True)
class Phase:
    """A stretch of joint training: how many steps, and what each of them holds.

    Attributes:
        proposals, tasks: of the Proposer: to ask a question, and to write a drawing task.
        layouts, regions, scattered: questions of the judge about whole pictures, about all of their cells in order, and
            about some cells in any order.
    """

    steps: int
    drawings: int = 0
    captions: int = 0
    questions: int = 0
    tables: int = 0
    lookups: int = 0
    proposals: int = 0
    tasks: int = 0
    layouts: int = 0
    regions: int = 0
    scattered: int = 0


@dataclass(frozen=True)
class Settings:
    """Everything that determines the checkpoint."""

    seed: int = 0
    learning_rate: float = 1.0e-3
    warmup: int = 40  # steps
    decay: float = 0.6  # share of all steps, at the end, over which the rate falls to zero
    # Regions first: after look-ups a model of this size hardly learns to find the cell that a box names. Single
    # look-ups before single questions, which build on them; then drawing, by a model that reads.
    phases: tuple[Phase, ...] = (
        Phase(steps=100, regions=28),
        Phase(steps=350, lookups=36, regions=12),
        Phase(steps=250, questions=24, tables=12, proposals=3, tasks=2, layouts=6, regions=8, scattered=4),
        Phase(
            steps=1900, drawings=56, captions=8, questions=16, tables=4, proposals=3, tasks=2, layouts=4, regions=4,
            scattered=2,
        ),
    )  # fmt: skip
    rating_weight: float = 1.0
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
        ("number", 0.4),
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
    """Pictures, questions and answers: captions, questions in any framing, tables and look-ups, the Proposer's."""
    families, weights = zip(*settings.family_weights, strict=True)
    images, questions, answers = [], [], []
    for _ in range(phase.captions):
        metadata = random_metadata(rng)
        images.append(render(scene_for(metadata, rng)))
        questions.append(DESCRIBE)
        answers.append(metadata["prompt"])
    asked_questions = []
    for family in rng.choices(families, weights, k=phase.questions):
        asked = make_question(family, rng)
        framing = TAUGHT_FRAMINGS[rng.randrange(len(TAUGHT_FRAMINGS))]
        asked_questions.append(replace(asked, question=framing + asked.question))
    asked_questions += [make_table(rng, TABLES) for _ in range(phase.tables)]
    asked_questions += [make_table(rng, LOOKUPS) for _ in range(phase.lookups)]
    asked_questions += [proposal(rng) for _ in range(phase.proposals)] + [drawing_task(rng) for _ in range(phase.tasks)]
    for asked in asked_questions:
        images.append(render(asked.scene))
        questions.append(asked.question)
        answers.append(asked.answer)
    return images, questions, answers


def answering_loss(
    backbone: Backbone, images: Sequence[np.ndarray], questions: Sequence[str], answers: Sequence[str]
) -> torch.Tensor:
    """Mean negative log-likelihood of the answers' tokens and of their ends, nats."""
    score = backbone.text_logps(images, questions, answers, end_of_turn=True)
    return -(score.log_probs * score.mask).sum() / score.mask.sum()


def reading_losses(backbone: Backbone, settings: Settings, phase: Phase, rng: random.Random) -> dict[str, torch.Tensor]:
    """Losses of answers to questions, and to the judge's; 0 for what the phase lacks."""
    read = rate = torch.zeros(())
    asked = reading_batch(settings, phase, rng)
    if asked[0]:
        read = answering_loss(backbone, *asked)
    made = [rate_layout(rng) for _ in range(phase.layouts)]
    made += [rate_regions(rng, i >= phase.regions) for i in range(phase.regions + phase.scattered)]
    if made:
        columns = zip(*((r.image, r.question, r.answer) for r in made), strict=True)
        rate = settings.rating_weight * answering_loss(backbone, *columns)
    return {"reading": read, "rating": rate}


def learning_rate(settings: Settings, step: int, total: int) -> float:
    """Rate at `step` (from 1) of `total`: linear warm-up, constant, linear decay to zero."""
    left = (total - step) / (settings.decay * total)
    return settings.learning_rate * min(1.0, step / settings.warmup, left)


def optimise(
    parameters: Sequence[nn.Parameter],
    settings: Settings,
    losses: Callable[[Phase], dict[str, torch.Tensor]],
    check: Callable[[], None],
    log: Callable[[str], None],
) -> None:
    """Run all phases.

    Args:
        losses: of a new batch, by name; their sum is minimised.
        check: called now and then to log what the model can do.
    """
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    plan = [phase for phase in settings.phases for _ in range(phase.steps)]
    for step, phase in enumerate(plan, 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, len(plan))
        values = losses(phase)
        optimizer.zero_grad(set_to_none=True)
        sum(values.values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0:
            shown = " ".join(f"{name} {value.item():.3f}" for name, value in values.items())
            log(f"joint step {step}/{len(plan)} {shown}")
        if step % CHECK_EVERY == 0 and step < len(plan):
            check()


def report(
    backbone: Backbone,
    sampling: ReplaySettings,
    log: Callable[[str], None],
    questions: int = 200,
    captions: int = 600,
    samples: int = 4,
    scenes: int = 600,
) -> None:
    """Log what a checkpoint can do; see `measure` for the counts, of which `samples` are pictures of a prompt."""
    log(measure.one_line(measure.abilities(backbone, sampling, questions, captions, samples)))
    log("rating scenes: " + measure.one_line(measure.ratings_of_scenes(backbone, 7, scenes)))
    drawn = measure.judging(backbone, *measure.drawings(backbone, 1, sampling))
    log("rating its own pictures: " + measure.one_line(drawn))
    log("proposing: " + measure.one_line(measure.proposing(backbone, 7, scenes // 4)))


S = TypeVar("S", bound=Settings)


def main(
    argv: Sequence[str] | None,
    module: str,
    description: str,
    settings: S,
    make: Callable[[Path, S, Callable[[str], None]], None],
) -> int:
    """Command line of a training.

    Args:
        module: its name, for the help text.
        settings: all but the seed.
        make: trains a checkpoint into a folder, given the settings and where to log.
    """
    parser = command_parser(module, description, f"python -m {module} --out /tmp/tiny --threads 2")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new checkpoint")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (part of the result)")
    parser.add_argument("--seed", type=int, default=settings.seed)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    start = time.monotonic()
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        print(f"{time.monotonic() - start:7.0f} s  {line}", file=sys.stderr, flush=True)

    settings = replace(settings, seed=arguments.seed)
    log(repr(settings))
    # Made elsewhere and copied at the end: a run that is interrupted leaves the old checkpoint whole.
    with tempfile.TemporaryDirectory() as work:
        make(Path(work), settings, log)
        arguments.out.mkdir(parents=True, exist_ok=True)
        for file in Path(work).iterdir():
            shutil.copyfile(file, arguments.out / file.name)
    (arguments.out / "training.log").write_text("\n".join(lines) + "\n")
    return 0
