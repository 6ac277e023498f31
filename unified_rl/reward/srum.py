"""SRUM's reward: the judge's scores of an image and of its regions as a dense map (arXiv 2510.12784, section 3).

For every image the judge is asked twice: for one score of the composition, and for one score of each region. What it
answers is read by `srum_parse` and painted by `reward_map`. First answers are greedy. Those that cannot be read are
asked for again with some temperature and a seed of their own, because a greedy judge would only repeat itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from unified_rl.config import SrumConfig
from unified_rl.config_checks import MAX_REGIONS
from unified_rl.records import MAX_REGION_TEXT
from unified_rl.reward.regions import (
    REGION_RULES,
    Box,
    Region,
    RegionError,
    component_regions,
    filter_regions,
    grid_regions,
    load_boxes,
    user_regions,
)
from unified_rl.reward.reward_map import MAP_RULES, RewardMap, is_left_out, reward_map
from unified_rl.reward.srum_parse import JudgeScore, ParseFailure, parse_global, parse_regions
from unified_rl.reward.srum_prompts import THINK_INSTRUCTION, global_question, local_question

if TYPE_CHECKING:
    from unified_rl.backbones.base import TextTraj
    from unified_rl.backbones.load import Backbone

MAX_REPLY_CHARACTERS = 2000  # of a reply that is kept, from its end, where the answer stands
QUOTED_CHARACTERS = 80  # of a reply in the reason of a failure

Results = dict[int, JudgeScore | ParseFailure]


@dataclass(frozen=True)
class SrumScore:
    """What the judge made of one image.

    Attributes:
        status: `ok`, `failed` (a score that must be there could not be read) or `skipped` (the release leaves the
            image out).
        reason: why it is not ok; else empty.
        boxes: K boxes in pixels of the image; none where regions are not asked for.
        region_scores: K results; a failure is a region that stayed unread and is not painted.
        global_score: None where it is not asked for.
        reward_map: None unless ok.
        attempts: by question (`global`, `local`), how often the judge was asked; 0 where it was not.
        replies: by question, the end of the judge's last reply.
    """

    status: str
    reason: str
    boxes: list[Box]
    region_scores: list[JudgeScore | ParseFailure]
    global_score: JudgeScore | ParseFailure | None
    reward_map: RewardMap | None
    attempts: dict[str, int]
    replies: dict[str, str]

    @property
    def scalar(self) -> float:
        """The image as one number in -1..1: mean of alpha R over the cells. NaN unless ok.

        It is what logs show and what compares the images of a group; training uses the map itself.
        """
        return math.nan if self.reward_map is None else float(self.reward_map.weights.double().mean())


@dataclass
class _Question:
    """One question about one image, and what is known of its answer: scores once read are kept."""

    image: np.ndarray
    text: str
    seed: int
    read: Callable[[str, bool], Results]  # reply, truncated
    results: Results = field(default_factory=dict)
    attempts: int = 0
    reply: str = ""

    @property
    def is_open(self) -> bool:
        return not self.attempts or any(isinstance(r, ParseFailure) for r in self.results.values())

    def take(self, reply: str, truncated: bool) -> None:
        self.attempts += 1
        self.reply = reply[-MAX_REPLY_CHARACTERS:]
        for item, result in self.read(reply, truncated).items():
            if not isinstance(self.results.get(item), JudgeScore):
                self.results[item] = result

    def problem(self, name: str, failure: ParseFailure) -> str:
        """Reason of a failed image."""
        tries = f"{self.attempts} attempt{'s' if self.attempts > 1 else ''}"
        return f"{name}: {failure.reason} (after {tries}; the last reply ends {self.reply[-QUOTED_CHARACTERS:]!r})"


class SrumJudge:
    """Scores images for their prompts.

    An image fails when its global score, or all of its region scores, could not be read. The release goes on without
    region scores (so the map is its background), and skips images whose global score is missing or 0.

    Args:
        backbone: the judge; its answers decide, its weights are not touched.
        settings: see there.
        grid: (rows, columns) of the reward map: cells of the latents or image tokens of a drawn image.
        device: where Segment Anything runs.

    Raises:
        RegionError: a file of boxes or a SAM checkpoint that cannot be used.
    """

    def __init__(
        self, backbone: Backbone, settings: SrumConfig, grid: tuple[int, int], device: torch.device | str = "cpu"
    ) -> None:
        self.backbone = backbone
        self.settings = settings
        self.grid = grid
        self.map_rules = MAP_RULES[settings.preset]
        self.given = load_boxes(Path(settings.boxes_file)) if settings.regions == "file" else {}
        self.propose: Callable[[np.ndarray], list[Region]] = component_regions
        if settings.regions == "sam" and settings.use_local:
            from unified_rl.reward.sam import SamProposer

            self.propose = SamProposer(settings.sam_path, device)

    def score(
        self, images: Sequence[np.ndarray], prompts: Sequence[str], prompt_ids: Sequence[str], seeds: Sequence[int]
    ) -> list[SrumScore]:
        """Scores of B uint8 [H, W, 3] images, which may differ in size, for B prompts.

        All images are asked in one batch for each question; a score depends on its own image, prompt and seed only.

        Args:
            prompts: as the user wrote them, not rewritten.
            prompt_ids: by which a file of boxes is looked up.
            seeds: of the images; attempts after the first draw from seeds that are made of them.

        Raises:
            ValueError: lists of different lengths.
            RegionError: no boxes for a prompt in the file.
        """
        boxes = [self.boxes_of(i, p) for i, p in zip(images, prompt_ids, strict=True)]
        wholes = [
            self._whole_question(*about) if self.settings.use_global else None
            for about in zip(images, prompts, seeds, strict=True)
        ]
        parts = [
            self._local_question(*about) if about[-1] else None
            for about in zip(images, prompts, seeds, boxes, strict=True)
        ]
        self._ask("global", [q for q in wholes if q], self.settings.max_new_tokens_global)
        self._ask("local", [q for q in parts if q], self.settings.max_new_tokens_local)
        return [self._score_of(*about) for about in zip(images, boxes, wholes, parts, strict=True)]

    def boxes_of(self, image: np.ndarray, prompt_id: str) -> list[Box]:
        """Boxes of the regions that are judged, in pixels of the image."""
        settings, (height, width) = self.settings, image.shape[:2]
        if not settings.use_local:
            return []
        if settings.regions == "grid":
            regions = grid_regions(height, width, settings.grid_rows, settings.grid_columns)
        elif settings.regions == "file":
            if prompt_id not in self.given:
                raise RegionError(f"{settings.boxes_file} has no line for prompt {prompt_id}")
            regions = user_regions(self.given[prompt_id], height, width)
            if len(regions) > MAX_REGIONS:
                raise RegionError(f"{settings.boxes_file}: prompt {prompt_id} has more than {MAX_REGIONS} boxes")
        else:
            regions = filter_regions(self.propose(image), height, width, REGION_RULES[settings.preset])
        return [region.box for region in regions]

    def _whole_question(self, image: np.ndarray, prompt: str, seed: int) -> _Question:
        text = global_question(prompt, self.settings.wording)
        return _Question(image, text, seed, lambda reply, cut: {1: parse_global(reply, cut)})

    def _local_question(self, image: np.ndarray, prompt: str, seed: int, boxes: list[Box]) -> _Question:
        height, width = image.shape[:2]
        text = local_question(prompt, boxes, height, width, self.settings.with_reason, self.settings.wording)
        return _Question(image, text, seed, lambda reply, cut: parse_regions(reply, len(boxes), cut))

    def _ask(self, name: str, questions: list[_Question], max_new_tokens: int) -> None:
        """Put the questions until each is answered in full or its attempts are used up."""
        settings = self.settings
        for attempt in range(1 + settings.retries):
            still = [q for q in questions if q.is_open]
            if not still:
                return
            replies = self.backbone.rollout_text(
                [q.image for q in still],
                [q.text for q in still],
                [attempt_seed(q.seed, name, attempt) for q in still],
                max_new_tokens,
                settings.retry_temperature if attempt else 0.0,
                system=(settings.think_instruction or THINK_INSTRUCTION) if settings.think else "",
            )
            cut = truncated_rows(replies, max_new_tokens, self.backbone.tokenizer.eos_token_id)
            for question, reply, truncated in zip(still, replies.texts, cut, strict=True):
                question.take(reply, truncated)

    def _score_of(
        self, image: np.ndarray, boxes: list[Box], whole: _Question | None, part: _Question | None
    ) -> SrumScore:
        judged = whole.results[1] if whole else None
        results = [part.results[i] for i in range(1, len(boxes) + 1)] if part else []
        status, reason = self._status_of(whole, part)
        made = self._map_of(image, boxes, judged, results) if status == "ok" else None
        asked = {"global": whole, "local": part}
        return SrumScore(
            status, reason, boxes, results, judged, made,
            attempts={name: q.attempts if q else 0 for name, q in asked.items()},
            replies={name: q.reply for name, q in asked.items() if q},
        )  # fmt: skip

    def _status_of(self, whole: _Question | None, part: _Question | None) -> tuple[str, str]:
        """Status of an image, and the reason where it is not ok."""
        judged = whole.results[1] if whole else None
        if whole and is_left_out(_number(judged), self.map_rules):
            missing = isinstance(judged, ParseFailure)
            return "skipped", whole.problem("global score", judged) if missing else "the global score is exactly 0"
        if isinstance(judged, ParseFailure):
            return "failed", whole.problem("global score", judged)
        failures = [r for r in part.results.values() if isinstance(r, ParseFailure)] if part else []
        if failures and len(failures) == len(part.results) and self.settings.preset == "srum":
            return "failed", part.problem("regions", failures[0])
        return "ok", ""

    def _map_of(
        self, image: np.ndarray, boxes: list[Box], judged: JudgeScore | ParseFailure | None, results: list
    ) -> RewardMap:
        # A question that is not asked counts as answered with the best score: alpha = 1, or R = 1 everywhere.
        alpha_of = _number(judged) if self.settings.use_global else 1.0
        if not self.settings.use_local:
            height, width = image.shape[:2]
            return reward_map([(0, 0, width, height)], [1.0], alpha_of, (height, width), self.grid, self.map_rules)
        return reward_map(boxes, [_number(r) for r in results], alpha_of, image.shape[:2], self.grid, self.map_rules)


def attempt_seed(seed: int, question: str, attempt: int) -> int:
    """Seed in 0..2**63-1 of one attempt at a question about the image with seed `seed`."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{question}|{attempt}".encode()).digest()[:8], "big") >> 1


def truncated_rows(replies: TextTraj, max_new_tokens: int, end_of_turn: int | None) -> list[bool]:
    """For each reply, whether the length limit stopped it: as many tokens as allowed, and the last one ends no turn."""
    cut = []
    for ids, mask in zip(replies.ids.cpu(), replies.mask.cpu(), strict=True):
        length = int(mask.sum())
        cut.append(length >= max_new_tokens and int(ids[length - 1]) != end_of_turn)
    return cut


def record_fields(score: SrumScore) -> dict[str, Any]:
    """The fields of a `RewardRecord` that a score decides: status, reason, reward, components, tensors, regions.

    `reward` is the scalar. The tensor `reward_map` is R without alpha, fp32 [h, w]; alpha is a component.
    """
    read = [r.score for r in score.region_scores if isinstance(r, JudgeScore)]
    components: dict[str, float] = {
        "regions_read": len(read),
        "regions_failed": len(score.region_scores) - len(read),
        **{f"attempts_{name}": count for name, count in score.attempts.items()},
    }
    if isinstance(score.global_score, JudgeScore):
        components["global_score"] = score.global_score.score
    if read:
        components["region_score_mean"] = math.fsum(read) / len(read)
    tensors = {}
    if score.reward_map is not None:
        local = score.reward_map.local.clamp(-1.0, 1.0)  # resampling may round past the ends
        components["alpha"] = score.reward_map.alpha
        components["map_mean"] = float(local.double().mean())
        components["map_min"], components["map_max"] = float(local.min()), float(local.max())
        components["map_negative_share"] = float((local < 0).double().mean())
        tensors["reward_map"] = local.clone()
    return {
        "status": score.status,
        "reason": score.reason,
        "reward": score.scalar if score.status == "ok" else None,
        "components": components,
        "tensors": tensors,
        "regions": [_region_entry(b, r) for b, r in zip(score.boxes, score.region_scores, strict=True)],
    }


def _region_entry(box: Box, result: JudgeScore | ParseFailure) -> dict[str, Any]:
    named = result.object if isinstance(result, JudgeScore) else ""
    return {
        "box": list(box),
        "score": _number(result),
        "object": named[:MAX_REGION_TEXT],
        "reason": result.reason[:MAX_REGION_TEXT],
    }


def _number(result: JudgeScore | ParseFailure | None) -> float | None:
    return result.score if isinstance(result, JudgeScore) else None
