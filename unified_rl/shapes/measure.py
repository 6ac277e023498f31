"""What a model can do in the world of shapes: drawing by the detector, reading by captions and questions."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch

from unified_rl.backbones.base import Sampling
from unified_rl.backbones.janus import JanusBackbone
from unified_rl.shapes.prompts import CATEGORIES, caption_pairs, prompt_records
from unified_rl.shapes.questions import FAMILIES, make_questions
from unified_rl.shapes.tiny_janus import DESCRIBE
from unified_rl.shapes.world import is_correct, render

BATCH = 64


def _mean(values: list) -> float:
    return float(np.mean(values))


@torch.no_grad()
def caption_ranking(backbone: JanusBackbone, seed: int, pairs: int) -> float:
    """Share of scenes whose true caption is likelier (mean token log-likelihood) than one with a wrong word."""
    wins = []
    made = caption_pairs(seed, pairs)
    for start in range(0, pairs, BATCH):
        part = made[start : start + BATCH]
        images = [render(scene) for scene, *_ in part]
        true, wrong = (
            backbone.text_logps(images, [DESCRIBE] * len(part), [p[i] for p in part]).mean_log_prob() for i in (1, 2)
        )
        wins += (true > wrong).tolist()
    return _mean(wins)


@torch.no_grad()
def question_answering(backbone: JanusBackbone, seed: int, per_family: int) -> dict[str, float]:
    """Share of greedy answers that equal the true one, by family."""
    right = defaultdict(list)
    questions = make_questions(seed, per_family)
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        images = [render(q.scene) for q in part]
        texts = backbone.rollout_text(images, [q.question for q in part], [0] * len(part), 4, 0.0).texts
        for q, text in zip(part, texts, strict=True):
            right[q.family].append(text.strip().lower() == q.answer)
    return {family: _mean(right[family]) for family in FAMILIES}


@torch.no_grad()
def drawing(backbone: JanusBackbone, samples: int, guidance_scale: float = 1.0) -> dict[str, float]:
    """Detector accuracy of held-out prompts by category."""
    right = defaultdict(list)
    prompts = prompt_records("heldout")
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        seeds = [1000 * (start + i) + j for i in range(len(part)) for j in range(samples)]
        trajectory = backbone.rollout_images([p.text for p in part], seeds, Sampling(guidance_scale=guidance_scale))
        for i, image in enumerate(backbone.decode(trajectory)):
            metadata = part[i // samples].metadata
            right[metadata["tag"]].append(is_correct(image, metadata))
    return {tag: _mean(right[tag]) for tag in CATEGORIES}


def abilities(backbone: JanusBackbone, questions: int = 200, captions: int = 600, samples: int = 4) -> dict[str, float]:
    """Everything above as one dictionary of accuracies in 0..1."""
    drawn = drawing(backbone, samples)
    answered = question_answering(backbone, 7, questions)
    return {
        "overall": _mean(list(drawn.values())),
        **drawn,
        "caption_ranking": caption_ranking(backbone, 7, captions),
        "question_answering": _mean(list(answered.values())),
        **{f"question_answering/{family}": value for family, value in answered.items()},
    }


def one_line(values: dict[str, float]) -> str:
    """`name 0.123 name 0.456`."""
    return " ".join(f"{name} {value:.3f}" for name, value in values.items())
