"""What the weights under evaluation understand, measured on rendered scenes with known answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from unified_rl.config import RunConfig
from unified_rl.reward.answers import normalise
from unified_rl.reward.inquiry import rules_of
from unified_rl.reward.solver import framed_replies
from unified_rl.runtime import sample_seed
from unified_rl.shapes.measure import answer_family, rank_captions
from unified_rl.shapes.questions import FAMILIES, make_questions
from unified_rl.shapes.world import render

if TYPE_CHECKING:
    from unified_rl.backbones.load import Backbone

GREEDY, FRAMED = "question_answering", "framed_answering"
CAPTIONS_PER_QUESTION = 3  # caption pairs for each question of a family
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
            pairs = CAPTIONS_PER_QUESTION * count
            return rank_captions(backbone, QUESTION_SEED, pairs, config.reward.question, config.reward.batch_size)
        kind, _, family = name.partition("/")
        if kind == FRAMED:
            return answer_framings(backbone, family, config)
        return answer_family(backbone, QUESTION_SEED, family, count, config.reward.batch_size)


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
