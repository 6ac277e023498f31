"""Asking the Solver: one greedy answer in the canonical framing, or one sampled answer in each of several framings.

The role that answers is the caller's choice (`backbone.role`). All rows of a call are answered together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from unified_rl.config import SelfConsistencyConfig
from unified_rl.reward.answers import AnswerRules, SolverAnswer, read_answer
from unified_rl.reward.self_consistency_prompts import solver_question
from unified_rl.reward.srum import truncated_rows

if TYPE_CHECKING:
    from unified_rl.backbones.base import TextTraj
    from unified_rl.backbones.load import Backbone


@dataclass(frozen=True)
class Replies:
    """Replies of a call, row by row, and which of them were stopped by the length limit."""

    traj: TextTraj
    truncated: list[bool]

    def row(self, number: int, values: str = "ids") -> torch.Tensor:
        """`ids` int32, or `log_probs` or `entropies` fp32, of one reply, without padding, on the CPU: [T]."""
        kept = getattr(self.traj, values)[number][self.traj.mask[number] > 0].cpu()
        return kept.int() if values == "ids" else kept.float()

    def answers(self, settings: SelfConsistencyConfig, rules: AnswerRules) -> list[str | None]:
        """Normalised answers, None where a reply cannot be read."""
        read = [
            read_answer(text, cut, settings.wording == "full", rules)
            for text, cut in zip(self.traj.texts, self.truncated, strict=True)
        ]
        return [answer.text if isinstance(answer, SolverAnswer) else None for answer in read]


@torch.inference_mode()
def write(
    backbone: Backbone,
    images: Sequence[np.ndarray],
    questions: Sequence[str],
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
) -> Replies:
    """Replies of any role to questions about images."""
    traj = backbone.rollout_text(images, questions, seeds, max_new_tokens, temperature, top_p=top_p)
    return Replies(traj, truncated_rows(traj, max_new_tokens, backbone.tokenizer.eos_token_id))


def greedy_replies(
    backbone: Backbone, images: Sequence[np.ndarray], questions: Sequence[str], settings: SelfConsistencyConfig
) -> Replies:
    """One reply to each question in its canonical framing."""
    asked = [solver_question(question, 0, settings.wording) for question in questions]
    return write(backbone, images, asked, [0] * len(asked), settings.solver_tokens, 0.0)


def framed_replies(
    backbone: Backbone,
    images: Sequence[np.ndarray],
    questions: Sequence[str],
    seeds: Sequence[Sequence[int]],
    settings: SelfConsistencyConfig,
) -> Replies:
    """One sampled reply to each question for each of its seeds, in framings 0, 1, ...; question after question."""
    rows = [
        (image, solver_question(question, framing, settings.wording), seed)
        for image, question, group in zip(images, questions, seeds, strict=True)
        for framing, seed in enumerate(group)
    ]
    shown, asked, drawn = zip(*rows, strict=True)
    return write(
        backbone, shown, asked, drawn, settings.solver_tokens, settings.solver_temperature, settings.solver_top_p
    )
