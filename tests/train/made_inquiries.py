"""Run folders with an understanding iteration's records: texts really sampled from a tiny model, rewards made up.

The rollout and reward stages have no part in it. Of four images the last has no chosen question; the second reply on
the first image counts as one without a question; one answer of the second image could not be read.
"""

import random
from pathlib import Path

import torch

from unified_rl.backbones.load import load_backbone
from unified_rl.config import open_run
from unified_rl.inquiries import InquiryRecord, InquiryReward
from unified_rl.ledger import Run
from unified_rl.manifests import Manifest
from unified_rl.reward.self_consistency_prompts import proposer_question, solver_question
from unified_rl.shapes.questions import random_scene
from unified_rl.shapes.world import render
from unified_rl.shards import write_records

IMAGES = 4
QUESTIONS = ("what color is the circle?", "how many squares are there?", "is there a red ring?")
ANSWERS = 4
INVALID = (0, 1)  # image and reply without a question
UNREADABLE = (1, 2)  # image and answer
UNDECIDED = 3  # image without a chosen question


def open_inquiry_run(folder: Path, family: str, *overrides: str) -> Run:
    """A run on the tiny model of a family with iteration 0 written and scored."""
    config = open_run(
        folder, f"gvu_{family}_shapes", [
            "iterations=3", "reward.method=self_consistency", "data.images=unread", "data.prompts=unread",
            f"data.prompts_per_iteration={IMAGES}", "self_consistency.wording=brief",
            f"self_consistency.questions={len(QUESTIONS)}", f"self_consistency.answers={ANSWERS}",
            "self_consistency.proposer_learning_rate=1e-3", "self_consistency.solver_learning_rate=2e-3",
            "self_consistency.solver_groups_per_step=2", "train.scope=lora", "train.lora.rank=4", "train.lora.alpha=8",
            "train.groups_per_step=2", "train.micro_batch=5", "train.warmup_steps=1", "backbone.device=cpu",
            *overrides,
        ],
    )  # fmt: skip
    run = Run(folder, config)
    write_and_score(run, 0)
    return run


def write_and_score(run: Run, iteration: int) -> None:
    """Commit the rollout and reward stages of an understanding iteration."""
    policy, version = run.current_policy(iteration)
    backbone = load_backbone(run.config.backbone)
    if policy is not None:
        backbone.load_roles(policy)
    images = [render(random_scene(random.Random(f"{iteration} {i}"), 3)) for i in range(IMAGES)]
    inquiries = [inquiry(run, backbone, iteration, i, image, version) for i, image in enumerate(images)]
    rewards = [scored(record, i) for i, record in enumerate(inquiries)]
    for stage, records in (("rollout", inquiries), ("reward", rewards)):
        info = write_records(run.stage_folder(iteration, stage) / "shard-00000.tar", records)
        run.commit(Manifest(stage, iteration, [info], version, run.config_hash, {"images": IMAGES}))


def inquiry(run, backbone, iteration, number, image, version):
    """The record of one image."""
    settings, size = run.config.self_consistency, len(QUESTIONS)
    task = proposer_question("medium", "brief")
    seeds = [1000 * iteration + 100 * number + i for i in range(size * ANSWERS)]
    with backbone.role("proposer"):
        replies = backbone.rollout_text([image] * size, [task] * size, seeds[:size], 16, settings.proposer_temperature)
    asked = [k for k in range(size) if (number, k) != INVALID]
    questions = [QUESTIONS[k] for k in asked]
    framed = [solver_question(q, i, "brief") for q in questions for i in range(ANSWERS)]
    with backbone.role("solver"):
        greedy = backbone.rollout_text([image] * len(asked), questions, seeds[: len(asked)], 6, 0.0)
        answers = backbone.rollout_text(
            [image] * len(framed), framed, seeds[: len(framed)], 6, settings.solver_temperature
        )
    tensors = {
        "proposer_ids": replies.ids, "proposer_log_probs": replies.log_probs, "proposer_lengths": replies.mask.sum(1),
        "greedy_ids": spread(greedy.ids, asked), "greedy_entropies": spread(greedy.entropies, asked),
        "greedy_lengths": spread(greedy.mask.sum(1), asked),
        "answer_ids": spread(answers.ids.view(len(asked), ANSWERS, -1), asked),
        "answer_log_probs": spread(answers.log_probs.view(len(asked), ANSWERS, -1), asked),
        "answer_lengths": spread(answers.mask.sum(1).view(len(asked), ANSWERS), asked),
    }  # fmt: skip
    kinds = {name: torch.int32 if name.endswith(("ids", "lengths")) else torch.float32 for name in tensors}
    tensors = {name: tensor.to(kinds[name]) for name, tensor in tensors.items()}
    entries = []
    for k in range(size):
        place = asked.index(k) if k in asked else None
        answered = place is not None
        entries.append(
            {
                "task": task, "reply": replies.texts[k], "truncated": False,
                "question": QUESTIONS[k] if answered else "", "skipped": "" if answered else "no_question",
                "greedy": greedy.texts[place] if answered else "", "greedy_truncated": False,
                "greedy_pieces": ["x"] * int(tensors["greedy_lengths"][k]),
                "answers": answers.texts[place * ANSWERS : (place + 1) * ANSWERS] if answered else [],
                "answers_truncated": [False] * ANSWERS if answered else [],
            }
        )  # fmt: skip
    return InquiryRecord(f"image-{iteration}-{number}", 1, version, {}, image, entries, tensors)


def spread(rows: torch.Tensor, places: list[int]) -> torch.Tensor:
    """Rows at their places among all questions, zeros elsewhere."""
    whole = torch.zeros(len(QUESTIONS), *rows.shape[1:], dtype=rows.dtype)
    whole[places] = rows
    return whole


def scored(record: InquiryRecord, number: int) -> InquiryReward:
    """Made-up rewards, different for every reply and answer."""
    numbers = random.Random(record.image_id)
    chosen = -1 if number == UNDECIDED else 2
    answers = [None if (number, i) == UNREADABLE else f"answer {i}" for i in range(ANSWERS)]
    votes = {answer: 1 for answer in answers if answer}
    questions = [
        {
            "question": asked["question"], "skipped": asked["skipped"],
            "reward": -1.0 if asked["skipped"] else round(numbers.uniform(-1, 1), 3),
            "answers": [] if asked["skipped"] else answers, "votes": {} if asked["skipped"] else votes,
            "majority": "" if asked["skipped"] else "answer 0", "bucket": "" if asked["skipped"] else "hard",
            **dict.fromkeys(
                ("vote_entropy", "token_entropy", "rank", "agreement"), None if asked["skipped"] else 0.5
            ),
        }
        for asked in record.questions
    ]  # fmt: skip
    earned = [None if answer is None else round(numbers.uniform(-1, 1), 3) for answer in answers]
    return InquiryReward(
        record.image_id, record.policy_version, "ok", "", questions, chosen,
        "" if chosen >= 0 else "too_easy", earned if chosen >= 0 else [],
    )  # fmt: skip
