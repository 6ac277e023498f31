"""The Generator's reward: does a drawing show the facts of its task, and does its caption lead back to the prompt.

The Solver answers and captions; which weights it has is configuration. Embeddings are always those of the base weights,
so that no role can make texts alike.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from unified_rl.config import SelfConsistencyConfig
from unified_rl.records import PromptRecord
from unified_rl.reward.diversity import diversity_scores
from unified_rl.reward.fidelity import FactCheck, check_facts, cosines, cycle_score, generation_reward
from unified_rl.reward.gvu import GvuScore, gvu_scores
from unified_rl.reward.inquiry import rules_of
from unified_rl.reward.self_consistency_prompts import caption_question
from unified_rl.reward.skips import Skipped, SkipReason
from unified_rl.reward.solver import framed_replies, greedy_replies, write
from unified_rl.runtime import sample_seed

if TYPE_CHECKING:
    from unified_rl.backbones.load import Backbone


@dataclass(frozen=True)
class FidelityJudge:
    """Scores images of drawing tasks; `role` answers and captions, None for the base weights."""

    backbone: Backbone
    settings: SelfConsistencyConfig
    role: str | None

    def score(
        self, images: Sequence[np.ndarray], prompts: Sequence[PromptRecord], seeds: Sequence[int]
    ) -> list[tuple[float | Skipped, dict[str, float]]]:
        """Reward and its parts of each uint8 [H, W, 3] image; images of one prompt are neighbours.

        Args:
            seeds: of the images; sampled answers have theirs from them.
        """
        rules = rules_of(self.settings).generation
        facts = self._facts(images, prompts, seeds)
        captions, pictures = self._similarities(images, [prompt.text for prompt in prompts])
        variety: list[float | None] = [None] * len(images)
        if rules.diversity:
            groups = itertools.groupby(range(len(images)), key=lambda i: prompts[i].prompt_id)
            variety = [v for _, rows in groups for v in diversity_scores([images[i] for i in rows])]
        scores = []
        for i, prompt in enumerate(prompts):
            cycle = cycle_score(captions[i], pictures[i])
            quality = prompt.metadata["quality"]
            reward = generation_reward(facts[i], cycle, quality, variety[i], rules)
            parts = {} if isinstance(reward, Skipped) else {
                "fidelity": facts[i].score, "contradiction": facts[i].contradiction, "cycle": cycle,
                "caption_similarity": captions[i], "image_similarity": pictures[i], "quality": quality,
            }  # fmt: skip
            scores.append((reward, parts | ({"diversity": variety[i]} if parts and rules.diversity else {})))
        return scores

    def _facts(
        self, images: Sequence[np.ndarray], prompts: Sequence[PromptRecord], seeds: Sequence[int]
    ) -> list[FactCheck | Skipped]:
        """How the Solver answers every task's questions on its images: all questions of all images together."""
        rules, samples = rules_of(self.settings), self.settings.fidelity_samples
        pairs = [prompt.metadata["pairs"] for prompt in prompts]
        rows = [(i, j, question) for i, asked in enumerate(pairs) for j, (question, _) in enumerate(asked)]
        shown, questions = [images[i] for i, _, _ in rows], [question for _, _, question in rows]
        with self.backbone.role(self.role):
            if samples == 1:
                replies = greedy_replies(self.backbone, shown, questions, self.settings)
            else:
                drawn = [[sample_seed(seeds[i], j, "fidelity", n) for n in range(samples)] for i, j, _ in rows]
                replies = framed_replies(self.backbone, shown, questions, drawn, self.settings)
        answers = iter(replies.answers(self.settings, rules.answers))
        given = [[[next(answers) for _ in range(samples)] for _ in asked] for asked in pairs]
        return [
            check_facts(told, [reference for _, reference in asked], rules.generation)
            for told, asked in zip(given, pairs, strict=True)
        ]

    @torch.inference_mode()
    def _similarities(
        self, images: Sequence[np.ndarray], prompts: Sequence[str]
    ) -> tuple[list[float | Skipped], list[float | Skipped]]:
        """How close each prompt is to the caption of its image, and to the image itself: cosine, or likelihood."""
        probe = caption_question(self.settings.wording)
        with self.backbone.role(self.role):
            captions = write(
                self.backbone, images, [probe] * len(images), [0] * len(images), self.settings.caption_tokens, 0.0
            ).traj.texts
        with self.backbone.role(None):
            wanted = self.backbone.embed([None] * len(images), prompts)
            # A caption without a word has no embedding; the prompt stands in for it.
            texts = [caption if caption.strip() else prompt for caption, prompt in zip(captions, prompts, strict=True)]
            found = cosines(wanted, self.backbone.embed([None] * len(images), texts))
            empty = Skipped(SkipReason.EMPTY_REPLY, "the caption")
            said = [value if caption.strip() else empty for caption, value in zip(captions, found, strict=True)]
            if self.settings.image_term == "likelihood":
                return said, likelihoods(gvu_scores(self.backbone, images, prompts, probe))
            seen = self.backbone.embed(images, [probe] * len(images))
        return said, cosines(wanted, seen)


def likelihoods(scores: Sequence[GvuScore]) -> list[float | Skipped]:
    """Geometric mean in 0..1 of the probabilities of a prompt's tokens; skipped where it is not a number.

    Its value without the image is the same for all drawings of a prompt, so nothing is taken off for it.
    """
    bad = Skipped(SkipReason.BAD_SIMILARITY, "the likelihood of the prompt is not finite")
    return [s.geometric_mean if s.tokens and math.isfinite(s.mean_log_prob) else bad for s in scores]
