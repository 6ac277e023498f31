"""Understanding iterations of Ask-Solve-Generate: questions of the Proposer about images, answers of the Solver."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from unified_rl.config import RunConfig
from unified_rl.inquiries import InquiryRecord
from unified_rl.records import ImageRecord
from unified_rl.reward.proposals import parse_questions
from unified_rl.reward.self_consistency_prompts import proposer_question
from unified_rl.reward.skips import Skipped, SkipReason
from unified_rl.reward.solver import Replies, framed_replies, greedy_replies, write
from unified_rl.runtime import sample_seed

if TYPE_CHECKING:
    from unified_rl.backbones.load import Backbone

SAMPLING = ("wording", "proposer_temperature", "proposer_tokens", "solver_temperature", "solver_top_p", "solver_tokens")


def inquire(
    backbone: Backbone, images: Sequence[ImageRecord], config: RunConfig, iteration: int, policy_version: str
) -> list[InquiryRecord]:
    """Questions about all images and their answers, in three calls: proposals, greedy answers, framed answers.

    Everything that is sampled has a seed of its own, so that the other images of the call do not matter.
    """
    ours = config.self_consistency
    tasks = [task_of(image.image_id, config, iteration) for image in images for _ in range(ours.questions)]
    shown = [image.image for image in images for _ in range(ours.questions)]
    names = [(image.image_id, k) for image in images for k in range(ours.questions)]
    seeds = [sample_seed(config.seed, iteration, f"{name}/question", k) for name, k in names]
    with backbone.role("proposer"):
        proposals = write(backbone, shown, tasks, seeds, ours.proposer_tokens, ours.proposer_temperature)
    parsed = [
        parse_questions(text, 1, cut)[0] for text, cut in zip(proposals.traj.texts, proposals.truncated, strict=True)
    ]
    questions = [
        _question(task, proposals, row, found) for row, (task, found) in enumerate(zip(tasks, parsed, strict=True))
    ]
    greedy, framed, places = _solve(backbone, shown, names, questions, config, iteration)
    records = []
    for number, image in enumerate(images):
        rows = range(number * ours.questions, (number + 1) * ours.questions)
        solved = [places.get(row) for row in rows]
        answers = [None if p is None else p * ours.answers + i for p in solved for i in range(ours.answers)]
        tensors = _padded("answer", framed, answers, "log_probs")
        tensors = {name: t.view(len(rows), ours.answers, *t.shape[1:]) for name, t in tensors.items()}
        tensors |= _padded("proposer", proposals, rows, "log_probs") | _padded("greedy", greedy, solved, "entropies")
        sampling = {name: getattr(ours, name) for name in SAMPLING}
        asked = [questions[row] for row in rows]
        records.append(
            InquiryRecord(image.image_id, seeds[rows[0]], policy_version, sampling, image.image, asked, tensors)
        )
    return records


def task_of(image_id: str, config: RunConfig, iteration: int) -> str:
    """What the Proposer is asked for. All K questions of an image have one difficulty: they are compared."""
    drawn = random.Random(sample_seed(config.seed, iteration, f"{image_id}/difficulty", 0)).random()
    ours = config.self_consistency
    return proposer_question("hard" if drawn < ours.hard_share else "medium", ours.wording)


def skip_counts(records: Sequence[InquiryRecord]) -> dict[str, int]:
    """For a shard's mark: questions, and for each reason how many of them were skipped."""
    counts = {"questions": sum(len(record.questions) for record in records)}
    for asked in (q for record in records for q in record.questions if q["skipped"]):
        name = f"skipped/{asked['skipped'].partition(':')[0]}"
        counts[name] = counts.get(name, 0) + 1
    return counts


def _question(task: str, proposals: Replies, row: int, found: str | Skipped) -> dict:
    skipped = found.text if isinstance(found, Skipped) else ""
    return {
        "task": task, "reply": proposals.traj.texts[row], "truncated": proposals.truncated[row],
        "question": "" if skipped else found, "skipped": skipped,
        "greedy": "", "greedy_pieces": [], "greedy_truncated": False, "answers": [], "answers_truncated": [],
    }  # fmt: skip


def _solve(
    backbone: Backbone, shown: list, names: list[tuple[str, int]], questions: list[dict], config: RunConfig,
    iteration: int,
) -> tuple[Replies | None, Replies | None, dict[int, int]]:  # fmt: skip
    """Fill in the answers of all questions that there are.

    Returns:
        Greedy replies and framed replies, None where there is no question, and for each row of an answered question
        its place among the greedy replies.
    """
    ours = config.self_consistency
    asked = [row for row, question in enumerate(questions) if not question["skipped"]]
    if not asked:
        return None, None, {}
    images, texts = [shown[row] for row in asked], [questions[row]["question"] for row in asked]
    streams = [f"{image_id}/answer-{k}" for image_id, k in (names[row] for row in asked)]
    seeds = [[sample_seed(config.seed, iteration, name, i) for i in range(ours.answers)] for name in streams]
    with backbone.role("solver"):
        greedy = greedy_replies(backbone, images, texts, ours)
        framed = framed_replies(backbone, images, texts, seeds, ours)
    places = {}
    for place, row in enumerate(asked):
        question, rows = questions[row], slice(place * ours.answers, (place + 1) * ours.answers)
        if not bool(greedy.row(place, "entropies").isfinite().all()):
            question["question"], question["skipped"] = "", Skipped(SkipReason.BAD_ENTROPY, question["question"]).text
            continue
        question |= {
            "greedy": greedy.traj.texts[place],
            "greedy_pieces": [
                backbone.tokenizer.decode([i], skip_special_tokens=True) for i in greedy.row(place).tolist()
            ],
            "greedy_truncated": greedy.truncated[place],
            "answers": framed.traj.texts[rows],
            "answers_truncated": framed.truncated[rows],
        }
        places[row] = place
    return greedy, framed, places


def _padded(role: str, replies: Replies | None, rows: Sequence[int | None], values: str) -> dict[str, torch.Tensor]:
    """`ROLE_ids`, `ROLE_VALUES` [B, T] and `ROLE_lengths` [B] of rows of the replies; None is a row of length 0."""
    lengths = [0 if row is None else len(replies.row(row)) for row in rows]
    tensors = {f"{role}_lengths": torch.tensor(lengths).int()}
    for name, dtype in (("ids", torch.int32), (values, torch.float32)):
        block = torch.zeros(len(rows), max(1, *lengths), dtype=dtype)
        for place, row in enumerate(rows):
            if row is not None:
                block[place, : lengths[place]] = replies.row(row, name)
        tensors[f"{role}_{name}"] = block
    return tensors
