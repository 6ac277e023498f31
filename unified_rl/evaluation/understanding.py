"""What the weights under evaluation understand, measured on rendered scenes with known answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from unified_rl.config import RunConfig
from unified_rl.shapes.prompts import caption_pairs
from unified_rl.shapes.questions import FAMILIES, make_questions
from unified_rl.shapes.world import render

if TYPE_CHECKING:
    from unified_rl.backbones.load import Backbone

QUESTION_SETS = ("caption_ranking", *(f"question_answering/{family}" for family in FAMILIES))
CAPTIONS_PER_QUESTION = 3  # caption pairs for each question of a family
ANSWER_TOKENS = 4
QUESTION_SEED = 20_000  # scenes and questions of evaluation; the same for all runs, so that runs can be compared


def answer(backbone: Backbone, name: str, config: RunConfig) -> list[bool]:
    """Outcomes of one set of questions (a member of QUESTION_SETS), in a fixed order."""
    count = config.evaluate.questions
    with torch.inference_mode():
        if name == "caption_ranking":
            return rank_captions(
                backbone, CAPTIONS_PER_QUESTION * count, config.reward.question, config.reward.batch_size
            )
        return answer_family(backbone, name.partition("/")[2], count, config.reward.batch_size)


def rank_captions(backbone: Backbone, pairs: int, question: str, batch: int) -> list[bool]:
    """Whether the true caption of a scene has a higher mean token log-likelihood than one with a wrong word."""
    outcomes: list[bool] = []
    made = caption_pairs(QUESTION_SEED, pairs)
    for start in range(0, pairs, batch):
        part = made[start : start + batch]
        images = [render(scene) for scene, *_ in part]
        true = mean_log_likelihood(backbone, images, question, [p[1] for p in part])
        wrong = mean_log_likelihood(backbone, images, question, [p[2] for p in part])
        outcomes += (true > wrong).tolist()
    return outcomes


def mean_log_likelihood(backbone: Backbone, images: list, question: str, captions: list[str]) -> torch.Tensor:
    """fp64 [B] mean log-likelihood of the captions' tokens."""
    score = backbone.text_logps(images, [question] * len(images), captions)
    mask = score.mask.double()
    return ((score.log_probs.double() * mask).sum(1) / mask.sum(1)).cpu()


def answer_family(backbone: Backbone, family: str, count: int, batch: int) -> list[bool]:
    """Whether the greedy answer equals the true one, for `count` questions of a family."""
    outcomes: list[bool] = []
    questions = [q for q in make_questions(QUESTION_SEED, count) if q.family == family]
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        images = [render(q.scene) for q in part]
        texts = backbone.rollout_text(images, [q.question for q in part], [0] * len(part), ANSWER_TOKENS, 0.0).texts
        outcomes += [text.strip().lower() == q.answer for q, text in zip(part, texts, strict=True)]
    return outcomes
