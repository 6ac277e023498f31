"""What a model can do in the world of shapes: drawing by the detector, reading by captions, questions and ratings."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from unified_rl.backbones.base import ReplaySettings
from unified_rl.backbones.load import Backbone
from unified_rl.reward.proposals import DrawingTask, parse_drawing_task, parse_questions
from unified_rl.reward.srum_parse import JudgeScore, parse_global, parse_regions
from unified_rl.shapes import ratings
from unified_rl.shapes.prompts import CATEGORIES, caption_pairs, is_prompt, metadata_of, prompt_records
from unified_rl.shapes.proposing import PAIRS, drawing_task, proposal
from unified_rl.shapes.questions import FAMILIES, make_questions
from unified_rl.shapes.vocabulary import DESCRIBE
from unified_rl.shapes.world import detect, is_correct, render, satisfies

BATCH = 64
ANSWER_TOKENS = 4


def _mean(values: list) -> float:
    return float(np.mean(values)) if values else 0.0


@torch.no_grad()
def rank_captions(
    backbone: Backbone, seed: int, pairs: int, question: str = DESCRIBE, batch: int = BATCH
) -> list[bool]:
    """Whether the true caption of a scene has a higher mean token log-likelihood than one with a wrong word."""
    outcomes: list[bool] = []
    made = caption_pairs(seed, pairs)
    for start in range(0, pairs, batch):
        part = made[start : start + batch]
        images = [render(scene) for scene, *_ in part]
        true, wrong = (
            backbone.text_logps(images, [question] * len(part), [p[i] for p in part]).mean_log_prob() for i in (1, 2)
        )
        outcomes += (true > wrong).tolist()
    return outcomes


@torch.no_grad()
def answer_family(backbone: Backbone, seed: int, family: str, count: int, batch: int = BATCH) -> list[bool]:
    """Whether the greedy answer equals the true one, for `count` questions of a family."""
    outcomes: list[bool] = []
    questions = [q for q in make_questions(seed, count) if q.family == family]
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        images = [render(q.scene) for q in part]
        texts = backbone.rollout_text(images, [q.question for q in part], [0] * len(part), ANSWER_TOKENS, 0.0).texts
        outcomes += [text.strip().lower() == q.answer for q, text in zip(part, texts, strict=True)]
    return outcomes


@torch.no_grad()
def drawings(backbone: Backbone, samples: int, sampling: ReplaySettings) -> tuple[np.ndarray, list[dict]]:
    """uint8 [B, H, W, 3] pictures of held-out prompts, `samples` of each, and the metadata of each picture's prompt."""
    prompts = prompt_records("heldout")
    pictures = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        seeds = [1000 * (start + i) + j for i in range(len(part)) for j in range(samples)]
        pictures.append(backbone.decode(backbone.rollout_images([p.text for p in part], seeds, sampling)))
    return np.concatenate(pictures), [p.metadata for p in prompts for _ in range(samples)]


def accuracy(pictures: np.ndarray, metadata: Sequence[dict]) -> dict[str, float]:
    """Share of pictures that the detector finds correct, by category."""
    right = defaultdict(list)
    for image, wanted in zip(pictures, metadata, strict=True):
        right[wanted["tag"]].append(is_correct(image, wanted))
    return {tag: _mean(right[tag]) for tag in CATEGORIES}


def drawing(backbone: Backbone, samples: int, sampling: ReplaySettings) -> dict[str, float]:
    """Detector accuracy of held-out prompts by category."""
    return accuracy(*drawings(backbone, samples, sampling))


@torch.no_grad()
def judging(backbone: Backbone, pictures: Sequence[np.ndarray], metadata: Sequence[dict]) -> dict[str, float]:
    """How the backbone rates pictures of the world, asked for all cells in order and for the whole picture.

    Returns:
        `parsed`: share of replies that are read in full. Of those: `regions`: share of cells whose score has the sign
        (positive, none, negative) of the true one; `layout`: share of pictures whose score has the right sign.
    """
    asked = range(ratings.CELLS)
    parsed, regions, layout = [], [], []
    for start in range(0, len(pictures), BATCH):
        images, wanted = pictures[start : start + BATCH], metadata[start : start + BATCH]
        prompts = [m["prompt"] for m in wanted]
        seeds = [0] * len(prompts)
        questions = [ratings.local_question(p, asked) for p in prompts]
        local = backbone.rollout_text(images, questions, seeds, 40, 0.0).texts
        whole = backbone.rollout_text(images, [ratings.global_question(p) for p in prompts], seeds, 8, 0.0).texts
        for image, truth, cells, score in zip(images, wanted, local, whole, strict=True):
            scores = [read.score for read in parse_regions(cells, len(asked)).values() if isinstance(read, JudgeScore)]
            overall = parse_global(score)
            parsed += [len(scores) == len(asked), isinstance(overall, JudgeScore)]
            if len(scores) == len(asked):
                regions += (np.sign(scores) == np.sign(ratings.cell_scores(image, truth))).tolist()
            if isinstance(overall, JudgeScore):
                layout.append((overall.score > 0) == is_correct(image, truth))
    return {"parsed": _mean(parsed), "regions": _mean(regions), "layout": _mean(layout)}


def ratings_of_scenes(backbone: Backbone, seed: int, count: int) -> dict[str, float]:
    """`judging` of `count` pictures with prompts that fit them or not."""
    rng = random.Random(f"ratings-{seed}")
    pictures, metadata = zip(*(ratings.picture_for(rng) for _ in range(count)), strict=True)
    return judging(backbone, pictures, metadata)


@torch.no_grad()
def proposing(backbone: Backbone, seed: int, count: int) -> dict[str, float]:
    """What the backbone proposes at temperature 1 about `count` pictures of questions and as many of prompts.

    Returns:
        `questions`: share of replies that hold one question; `tasks`: share of drawing tasks in full form, and
        `true_tasks`: whose prompt is true of the picture.
    """
    rng = random.Random(f"proposing-{seed}")
    asked = [proposal(rng) for _ in range(count)] + [drawing_task(rng) for _ in range(count)]
    texts = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        seeds = [start + i for i in range(len(part))]
        images = [render(made.scene) for made in part]
        texts += backbone.rollout_text(images, [made.question for made in part], seeds, 60, 1.0).texts
    tasks = [parse_drawing_task(text, PAIRS) for text in texts[count:]]
    whole = [isinstance(task, DrawingTask) and not task.dropped for task in tasks]
    true = [
        full and is_prompt(task.prompt) and satisfies(detect(render(made.scene)), metadata_of(task.prompt))
        for full, task, made in zip(whole, tasks, asked[count:], strict=True)
    ]
    questions = [isinstance(parse_questions(text)[0], str) for text in texts[:count]]
    return {"questions": _mean(questions), "tasks": _mean(whole), "true_tasks": _mean(true)}


def abilities(
    backbone: Backbone, sampling: ReplaySettings, questions: int = 200, captions: int = 600, samples: int = 4
) -> dict[str, float]:
    """Drawing, captions and questions as one dictionary of accuracies in 0..1."""
    drawn = drawing(backbone, samples, sampling)
    answered = {family: _mean(answer_family(backbone, 7, family, questions)) for family in FAMILIES}
    return {
        "overall": _mean(list(drawn.values())),
        **drawn,
        "caption_ranking": _mean(rank_captions(backbone, 7, captions)),
        "question_answering": _mean(list(answered.values())),
        **{f"question_answering/{family}": value for family, value in answered.items()},
    }


def one_line(values: dict[str, float]) -> str:
    """`name 0.123 name 0.456`."""
    return " ".join(f"{name} {value:.3f}" for name, value in values.items())
