"""What the weights under evaluation understand, measured on rendered scenes with known answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from unified_rl.config import RunConfig
from unified_rl.reward.answers import normalise
from unified_rl.reward.inquiry import rules_of
from unified_rl.reward.solver import framed_replies
from unified_rl.runtime import sample_seed
from unified_rl.shapes.prompts import caption_pairs
from unified_rl.shapes.questions import FAMILIES, make_questions
from unified_rl.shapes.world import render

if TYPE_CHECKING:
    from unified_rl.backbones.load import Backbone

GREEDY, FRAMED = "question_answering", "framed_answering"
CAPTIONS_PER_QUESTION = 3  # caption pairs for each question of a family
ANSWER_TOKENS = 4
QUESTION_SEED = 20_000  # scenes and questions of evaluation; the same for all runs, so that runs can be compared


def question_sets(config: RunConfig) -> tuple[str, ...]:
    """What is asked: captions, every family of questions, and with a Solver every family in all of its framings."""
    kinds = (GREEDY, FRAMED) if config.reward.method == "self_consistency" else (GREEDY,)
    return ("caption_ranking", *(f"{kind}/{family}" for kind in kinds for family in FAMILIES))


def answer(backbone: Backbone, name: str, config: RunConfig) -> list[float]:
    """Outcomes in 0..1 of one set of questions (a member of `question_sets`), in a fixed order."""
    count = config.evaluate.questions
    with torch.inference_mode():
        if name == "caption_ranking":
            return rank_captions(
                backbone, CAPTIONS_PER_QUESTION * count, config.reward.question, config.reward.batch_size
            )
        kind, _, family = name.partition("/")
        if kind == FRAMED:
            return answer_framings(backbone, family, config)
        return answer_family(backbone, family, count, config.reward.batch_size)


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


def answer_framings(backbone: Backbone, family: str, config: RunConfig) -> list[float]:
    """Share of right ones among the answers to each question, sampled as the Solver's are, one in each framing."""
    ours = config.self_consistency
    rules, shares = rules_of(ours).answers, []
    questions = [q for q in make_questions(QUESTION_SEED, config.evaluate.questions) if q.family == family]
    size = max(1, config.reward.batch_size // ours.answers)
    for start in range(0, len(questions), size):
        part = questions[start : start + size]
        rows = range(start, start + len(part))
        seeds = [[sample_seed(QUESTION_SEED, row, family, n) for n in range(ours.answers)] for row in rows]
        replies = framed_replies(backbone, [render(q.scene) for q in part], [q.question for q in part], seeds, ours)
        given = iter(replies.answers(ours, rules))
        for question in part:
            true = normalise(question.answer, rules)
            shares.append(sum(next(given) == true for _ in range(ours.answers)) / ours.answers)
    return shares
