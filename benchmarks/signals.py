"""How well the signals of Ask-Solve-Generate agree with what is true, over the records of a run on the world of shapes.

Three questions, none of which training may ask, because only the exact detector can answer them:

- token entropy against errors: are the questions that the Solver is unsure of those that it answers wrongly?
- fidelity against the detector: do drawings that pass their task's questions show what the prompt asks for?
- matched against shuffled: does a task give its own drawings a higher reward than those of another task?

Correlations are Spearman's, with 95 % intervals over resampled images or tasks.

example: python benchmarks/signals.py --run runs/asg --out runs/asg/signals.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from unified_rl.backbones.load import load_backbone
from unified_rl.config import load_run_config, loop_of
from unified_rl.inquiries import InquiryRecord, InquiryReward
from unified_rl.ledger import Run
from unified_rl.records import RewardRecord, RolloutRecord
from unified_rl.reward.answers import normalise
from unified_rl.reward.drawings import FidelityJudge
from unified_rl.shapes.prompts import is_prompt, metadata_of
from unified_rl.shapes.questions import true_answer
from unified_rl.shapes.world import detect, is_correct
from unified_rl.shards import read_records

RESAMPLES = 400
Pairs = list[tuple[float, float]]


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranked = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for i in order[start:end]:
            ranked[i] = (start + 1 + end) / 2
        start = end
    return ranked


def spearman(pairs: Pairs) -> float:
    """Correlation of the ranks of both sides; NaN where a side does not vary."""
    first, second = (ranks(side) for side in zip(*pairs, strict=True))
    mean = (len(pairs) + 1) / 2
    covariance = sum((a - mean) * (b - mean) for a, b in zip(first, second, strict=True))
    spread = math.sqrt(sum((a - mean) ** 2 for a in first) * sum((b - mean) ** 2 for b in second))
    return covariance / spread if spread else math.nan


def interval(groups: Sequence[Pairs], measure: Callable[[Pairs], float], seed: int = 0) -> dict[str, float]:
    """`measure` over the pairs of all groups, with percentiles 2.5 and 97.5 over groups drawn with replacement."""
    rng = random.Random(seed)
    drawn = [
        measure([pair for group in rng.choices(groups, k=len(groups)) for pair in group]) for _ in range(RESAMPLES)
    ]
    drawn = sorted(value for value in drawn if not math.isnan(value))
    return {
        "value": measure([pair for group in groups for pair in group]),
        "low": drawn[int(0.025 * len(drawn))],
        "high": drawn[int(0.975 * len(drawn))],
        "groups": len(groups),
        "pairs": sum(map(len, groups)),
    }


def scored(run: Run, loop: str) -> list[int]:
    """The iterations of a loop whose rewards are committed."""
    wanted = [k for k in range(run.config.iterations) if loop_of(run.config, k) == loop]
    return [k for k in wanted if run.manifest(k, "reward") is not None]


def records(run: Run, iteration: int, stage: str, kind: type) -> Iterator:
    """All records of a committed stage."""
    return read_records(run.stage_folder(iteration, stage), run.require_manifest(iteration, stage).shards, kind)


def entropy_and_errors(run: Run) -> list[Pairs]:
    """For each image (token entropy, whether the greedy answer is wrong) of its questions that the picture decides."""
    groups = []
    for iteration in scored(run, "understanding"):
        rewards = {r.image_id: r for r in records(run, iteration, "reward", InquiryReward)}
        for inquiry in records(run, iteration, "rollout", InquiryRecord):
            seen, pairs = detect(inquiry.image), []
            for asked, score in zip(inquiry.questions, rewards[inquiry.image_id].questions, strict=True):
                true = true_answer(asked["question"], seen)
                if true is not None and score["token_entropy"] is not None:
                    wrong = normalise(asked["greedy"]) != normalise(true[1])
                    pairs.append((score["token_entropy"], float(wrong)))
            groups += [pairs] if pairs else []
    return groups


@dataclass(frozen=True)
class Task:
    """The drawings of one drawing task, with the fidelity of each that was scored, by key."""

    drawings: list[RolloutRecord]
    fidelity: dict[str, float]


def drawn_tasks(run: Run) -> list[Task]:
    """All tasks whose prompt the exact detector can judge."""
    tasks = []
    for iteration in scored(run, "generation"):
        rewards = records(run, iteration, "reward", RewardRecord)
        fidelity = {r.key: r.components["fidelity"] for r in rewards if r.status == "ok"}
        drawings = records(run, iteration, "rollout", RolloutRecord)
        groups = itertools.groupby(drawings, key=lambda r: (r.prompt.prompt_id, r.prompt.text))
        tasks += [Task(list(group), fidelity) for (_, text), group in groups if is_prompt(text)]
    return tasks


def fidelity_and_truth(task: Task) -> Pairs:
    """(fidelity, whether the drawing is correct) of a task's drawings."""
    wanted = metadata_of(task.drawings[0].prompt.text)
    return [(task.fidelity[r.key], float(is_correct(r.image, wanted))) for r in task.drawings if r.key in task.fidelity]


def matched_above_shuffled(run: Run, tasks: list[Task], limit: int) -> dict[str, float]:
    """Share of tasks whose own drawings earn more, on average, than as many of other prompts, each of another task."""
    judge = FidelityJudge(load_backbone(run.config.backbone, 0), run.config.self_consistency, None)
    rng = random.Random(0)
    chosen = rng.sample(tasks, min(limit, len(tasks)))
    higher = 0
    for own in chosen:
        prompt = own.drawings[0].prompt
        others = [task for task in tasks if task.drawings[0].prompt.text != prompt.text]
        count = min(len(own.drawings), len(others))
        shuffled = [rng.choice(task.drawings) for task in rng.sample(others, count)]
        shown = [r.image for r in [*own.drawings[:count], *shuffled]]
        scores = judge.score(shown, [prompt] * len(shown), list(range(len(shown))))
        means = [
            statistics.fmean([reward for reward, _ in part if isinstance(reward, float)] or [math.nan])
            for part in (scores[:count], scores[count:])
        ]
        higher += means[0] > means[1]  # nothing scored is not higher
    return {"value": higher / len(chosen), "groups": len(chosen)}


def main() -> None:
    """Print the three measurements; `--out` stores them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--tasks", type=int, default=200, help="tasks that are judged with another task's drawings")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    run = Run(arguments.run, load_run_config(arguments.run))
    tasks = drawn_tasks(run)
    result = {
        "entropy_and_errors": interval(entropy_and_errors(run), spearman),
        "fidelity_and_detector": interval([pairs for pairs in map(fidelity_and_truth, tasks) if pairs], spearman),
        "matched_above_shuffled": matched_above_shuffled(run, tasks, arguments.tasks),
    }
    for name, values in result.items():
        print(name.replace("_", " "), ", ".join(f"{key} {value:.4g}" for key, value in values.items()), sep=": ")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
