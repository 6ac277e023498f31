"""What the Generator earns for an image: facts, caption, and optionally variety (Ask-Solve-Generate, arXiv 2606.27376).

The Solver answers the drawing task's questions on the generated image (local check), and captions it (global check).
A part that could not be computed makes the image's reward `Skipped`; no part is replaced by another or by a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unified_rl.reward.answers import ANSWER_RULES, AnswerRules, match, normalise, polarity
from unified_rl.reward.skips import Skipped, SkipReason
from unified_rl.reward.votes import Votes, count_votes


@dataclass(frozen=True)
class GenerationRules:
    """How references are found and parts are weighted.

    `R = Q clip((w_f S_f + w_c S_c + w_d S_d) / (w_f + w_c + w_d) - w_x S_x, 0, 1)`: fidelity, cycle, diversity,
    contradiction, and the drawing task's quality Q.

    Attributes:
        fidelity, cycle, diversity, contradiction: the weights; a part of weight 0 is not needed.
        match_weight: of the match in the score of one question; the rest is the vote share of the answer.
        answers: how answers are compared.
        solver_reference: the reference is the Solver's majority on the real image, which must have `min_share` of the
            vote and match the Proposer's answer by `min_alignment`, because the prompt was written by the Proposer.
            Otherwise it is the Proposer's answer, unchecked.
        min_quality: Q below this skips the task.
    """

    fidelity: float = 0.65
    cycle: float = 0.20
    diversity: float = 0.0
    contradiction: float = 0.20
    match_weight: float = 0.7
    answers: AnswerRules = ANSWER_RULES["self_consistency"]
    solver_reference: bool = True
    min_share: float = 0.6
    min_alignment: float = 0.8
    min_quality: float = 0.35

    def __post_init__(self) -> None:
        weights = (self.fidelity, self.cycle, self.diversity, self.contradiction)
        if min(weights) < 0.0 or not sum(weights[:3]) > 0.0:
            raise ValueError(f"weights must not be negative, and one of the first three above 0: {weights}")


GENERATION_RULES = {
    "self_consistency": GenerationRules(),
    "self_consistency_release": GenerationRules(
        diversity=0.10, answers=ANSWER_RULES["self_consistency_release"], solver_reference=False
    ),
    "evolmm": GenerationRules(),
}


def reference_answer(
    votes: Votes | Skipped, expected: str, rules: GenerationRules = GENERATION_RULES["self_consistency"]
) -> str | Skipped:
    """The normalised answer that a drawing is held to, or why this question is dropped.

    Args:
        votes: of the Solver on the real image.
        expected: as the Proposer wrote it.
    """
    wanted = normalise(expected, rules.answers)
    if not rules.solver_reference:
        return wanted
    if isinstance(votes, Skipped):
        return votes
    if votes.share < rules.min_share:
        detail = f"the majority has {votes.share:.2f} of the vote, not {rules.min_share:g}"
        return Skipped(SkipReason.UNRELIABLE_REFERENCE, detail)
    if match(votes.majority, wanted, rules.answers) < rules.min_alignment:
        detail = f"the Solver sees {votes.majority!r}, the Proposer {wanted!r}"
        return Skipped(SkipReason.UNRELIABLE_REFERENCE, detail)
    return votes.majority


@dataclass(frozen=True)
class FactCheck:
    """How one generated image does in questions with reference answers.

    Attributes:
        score: S_f in 0..1, mean over questions of `match_weight match + (1 - match_weight) vote share`.
        contradiction: S_x in 0..1, share of questions answered yes for no, or no for yes.
        matches: of each question, 0..1.
    """

    score: float
    contradiction: float
    matches: tuple[float, ...]


def check_facts(
    answers: Sequence[Sequence[str | None]],
    references: Sequence[str],
    rules: GenerationRules = GENERATION_RULES["self_consistency"],
) -> FactCheck | Skipped:
    """Fidelity of one image.

    A question that has no readable answer fails the whole image: a mean over fewer questions could not be compared
    with the other images of the prompt.

    Args:
        answers: for each of M questions T normalised answers of the Solver; None where a reply could not be read.
        references: M normalised answers.

    Raises:
        ValueError: no question, or not one list of answers for each reference.
    """
    if not references or len(answers) != len(references):
        raise ValueError(f"{len(answers)} lists of answers for {len(references)} references")
    scores, matches, conflicts = [], [], 0
    for given, reference in zip(answers, references, strict=True):
        votes = count_votes(given, min_answers=1)
        if isinstance(votes, Skipped):
            return votes
        agreed = match(votes.majority, reference, rules.answers)
        matches.append(agreed)
        scores.append(rules.match_weight * agreed + (1.0 - rules.match_weight) * votes.share)
        conflicts += {polarity(votes.majority), polarity(reference)} == {"yes", "no"}
    return FactCheck(math.fsum(scores) / len(scores), conflicts / len(scores), tuple(matches))


def cosines(first: torch.Tensor, second: torch.Tensor) -> list[float | Skipped]:
    """Cosine in -1..1 of each of B pairs of embeddings [B, D]; skipped where it is undefined."""
    if first.dim() != 2 or first.shape != second.shape:
        raise ValueError(f"embeddings must share one shape [B, D], got {list(first.shape)} and {list(second.shape)}")
    first, second = first.double(), second.double()
    values = (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))
    bad = Skipped(SkipReason.BAD_SIMILARITY, "an embedding is zero or not finite")
    return [min(max(v, -1.0), 1.0) if math.isfinite(v) else bad for v in values.tolist()]


def cycle_score(
    caption: float | Skipped, image: float | Skipped | None = None, caption_weight: float = 0.5
) -> float | Skipped:
    """S_c in 0..1 of one image: `caption_weight caption + (1 - caption_weight) image`.

    Args:
        caption: cosine of the embeddings of prompt and caption.
        image: cosine of the embeddings of prompt and image; None where the method does without it, so that the caption
            alone counts.
    """
    for part in (caption, image):
        if isinstance(part, Skipped):
            return part
    value = caption if image is None else caption_weight * caption + (1.0 - caption_weight) * image
    return min(max(value, 0.0), 1.0)


def generation_reward(
    facts: FactCheck | Skipped,
    cycle: float | Skipped | None,
    quality: float,
    diversity: float | Skipped | None = None,
    rules: GenerationRules = GENERATION_RULES["self_consistency"],
) -> float | Skipped:
    """R in 0..1 of one image; skipped where a part that has a weight is.

    Q is the same for all images of a task: it does not change which of them is better, only by how much.

    Args:
        cycle, diversity: None only where its weight is 0.
        quality: of the drawing task, 0..1.

    Raises:
        ValueError: a part with a weight is None.
    """
    if quality < rules.min_quality:
        return Skipped(SkipReason.LOW_QUALITY, f"the task's quality is {quality:.2f}, below {rules.min_quality:g}")
    positive = 0.0
    fidelity = facts if isinstance(facts, Skipped) else facts.score
    parts = {"fidelity": fidelity, "cycle": cycle, "diversity": diversity}
    for name, part in parts.items():
        weight = getattr(rules, name)
        if weight == 0.0:
            continue
        if isinstance(part, Skipped):
            return part
        if part is None or not math.isfinite(part):
            raise ValueError(f"the part {name} has the weight {weight:g} but is {part}")
        positive += weight * part
    positive /= rules.fidelity + rules.cycle + rules.diversity
    if rules.contradiction:
        if isinstance(facts, Skipped):
            return facts
        positive -= rules.contradiction * facts.contradiction
    return quality * min(max(positive, 0.0), 1.0)
