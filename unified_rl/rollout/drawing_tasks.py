"""Generation iterations of Ask-Solve-Generate: drawing tasks of the Proposer, held to what the Solver sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unified_rl.config import RunConfig
from unified_rl.records import ImageRecord, PromptRecord
from unified_rl.reward.fidelity import reference_answer
from unified_rl.reward.inquiry import min_answers, rules_of
from unified_rl.reward.proposals import DrawingTask, ProposalRules, parse_drawing_task
from unified_rl.reward.self_consistency_prompts import drawing_task_question
from unified_rl.reward.skips import Skipped, SkipReason
from unified_rl.reward.solver import framed_replies, write
from unified_rl.reward.votes import Votes, count_votes
from unified_rl.runtime import sample_seed

if TYPE_CHECKING:
    from unified_rl.backbones.load import Backbone


@dataclass
class Attempt:
    """How far an image has come: a task (`prompt`), or why its last attempt failed.

    Attributes:
        rejected: prompt and reason of the last attempt that had a prompt, to be told to the Proposer.
        dropped: reasons why check questions of the accepted task were dropped.
    """

    image: ImageRecord
    prompt: PromptRecord | None = None
    why: Skipped | None = None
    rejected: tuple[str, str] | None = None
    dropped: list[Skipped] = field(default_factory=list)


def propose_tasks(
    backbone: Backbone, images: Sequence[ImageRecord], config: RunConfig, iteration: int
) -> list[Attempt]:
    """A drawing task for each image, with `task_retries` further attempts; all images of an attempt together.

    An accepted prompt has the id of its image, and metadata `image_id`, `quality` and `pairs`, each a question and the
    normalised answer that a drawing is held to.
    """
    ours = config.self_consistency
    attempts = [Attempt(image) for image in images]
    for number in range(1 + ours.task_retries):
        pending = [a for a in attempts if a.prompt is None]
        if not pending:
            break
        asked = [drawing_task_question(ours.pairs, a.rejected, ours.wording) for a in pending]
        seeds = [sample_seed(config.seed, iteration, f"{a.image.image_id}/task", number) for a in pending]
        shown = [a.image.image for a in pending]
        with backbone.role("proposer"):
            replies = write(backbone, shown, asked, seeds, ours.task_tokens, ours.proposer_temperature)
        rules = ProposalRules(min_pairs=ours.min_pairs)
        tasks: list[tuple[Attempt, DrawingTask]] = []
        for attempt, text, cut in zip(pending, replies.traj.texts, replies.truncated, strict=True):
            task = parse_drawing_task(text, ours.pairs, cut, rules)
            if isinstance(task, Skipped):
                attempt.why = task
            elif task.quality(ours.pairs) < ours.min_quality:
                attempt.why = Skipped(SkipReason.LOW_QUALITY, f"the task's quality is {task.quality(ours.pairs):.2f}")
                attempt.rejected = (task.prompt, attempt.why.text)
            else:
                tasks.append((attempt, task))
        _accept(backbone, tasks, config, iteration, number)
    return attempts


def skip_counts(attempts: Sequence[Attempt]) -> dict[str, int]:
    """For a shard's mark: images without a task and dropped check questions, for each reason."""
    counts: dict[str, int] = {}
    skips = [("skipped", a.why) for a in attempts if a.prompt is None]
    skips += [("dropped", reason) for a in attempts if a.prompt is not None for reason in a.dropped]
    for kind, skipped in skips:
        name = f"{kind}/{skipped.reason.value}"
        counts[name] = counts.get(name, 0) + 1
    return counts


def _accept(
    backbone: Backbone, tasks: list[tuple[Attempt, DrawingTask]], config: RunConfig, iteration: int, number: int
) -> None:
    """Hold the pairs of parsed tasks to the Solver's majority on the real images, in one call."""
    ours, rules = config.self_consistency, rules_of(config.self_consistency).generation
    rows = [(a.image, j, question) for a, task in tasks for j, (question, _) in enumerate(task.pairs)]
    votes: list[Votes | Skipped | None] = [None] * len(rows)
    if rules.solver_reference and rows:
        names = [f"{image.image_id}/reference-{number}-{j}" for image, j, _ in rows]
        seeds = [[sample_seed(config.seed, iteration, name, i) for i in range(ours.references)] for name in names]
        with backbone.role("solver"):
            replies = framed_replies(backbone, [r[0].image for r in rows], [r[2] for r in rows], seeds, ours)
        answers = replies.answers(ours, rules.answers)
        n = ours.references
        votes = [count_votes(answers[i * n : (i + 1) * n], min_answers(n)) for i in range(len(rows))]
    found = iter(votes)
    for attempt, task in tasks:
        references = [(q, reference_answer(next(found), expected, rules)) for q, expected in task.pairs]
        kept = [[q, r] for q, r in references if isinstance(r, str)]
        dropped = [r for _, r in references if isinstance(r, Skipped)]
        if len(kept) < ours.min_pairs:
            attempt.why = Skipped(SkipReason.UNRELIABLE_REFERENCE, "; ".join(d.text for d in dropped)[:400])
            attempt.rejected = (task.prompt, attempt.why.text)
            continue
        attempt.dropped = [*task.dropped, *dropped]
        metadata = {"image_id": attempt.image.image_id, "quality": task.quality(ours.pairs), "pairs": kept}
        attempt.prompt = PromptRecord(attempt.image.image_id, task.prompt, metadata)
