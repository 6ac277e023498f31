"""Everything that a report shows, read from the run folder. Nothing here is remembered between calls."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unified_rl.config import RunConfig, load_run_config, loop_of
from unified_rl.evaluation.folder import evaluated_iterations, evaluation_folder, require_scores
from unified_rl.evaluation.geneval import is_shapes_prompt
from unified_rl.evaluation.scoring import by_category
from unified_rl.ledger import Run
from unified_rl.manifests import LedgerError, Manifest, read_manifest
from unified_rl.records import RewardRecord, RolloutRecord
from unified_rl.report.timing import read_timings
from unified_rl.shards import read_records, read_shard

if TYPE_CHECKING:
    import numpy as np

STAGES = ("rollout", "reward", "train")
PICTURED_PROMPTS = 12
JUDGED_EACH = 4  # best and worst images that are shown with their regions
# Means over images of a reward record's components -> their tags.
SRUM_MEANS = {
    "global_score": "srum/global_score", "region_score_mean": "srum/region_score", "alpha": "srum/alpha",
    "map_negative_share": "srum/negative_share", "attempts_global": "srum/attempts_global",
    "attempts_local": "srum/attempts_local",
}  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """The committed state of a run.

    `manifests` has an entry for each committed stage of an iteration. `steps` are the lines of all metrics.jsonl in
    order, each with its `iteration`. `scores` are the evaluations by the number of iterations before them.
    """

    run: Run
    manifests: dict[tuple[int, str], Manifest]
    steps: list[dict]
    scores: dict[int, dict]
    seconds: dict[tuple[str, int], float]

    @property
    def config(self) -> RunConfig:
        """The frozen configuration of the run."""
        return self.run.config

    def iterations(self, stage: str) -> list[int]:
        """Iterations in which a stage is committed."""
        return sorted(k for k, s in self.manifests if s == stage)

    def scored(self, loop: str = "") -> list[int]:
        """Iterations whose rollouts are scored and not empty; of methods with two loops those of `loop`."""
        done = [k for k in self.iterations("reward") if (k, "rollout") in self.manifests]
        done = [k for k in done if self.manifests[k, "rollout"].counts.get("images", 0)]
        done = [k for k in done if not any(self.manifests[k, s].shards_removed for s in ("rollout", "reward"))]
        return [k for k in done if loop_of(self.config, k) in ("", loop or "generation")]

    @property
    def last(self) -> int | None:
        """The last evaluation of trained weights, None before there is one."""
        return max((k for k in self.scores if k > 0), default=None)


def read_truth(path: Path) -> Truth:
    """Read manifests, metrics, evaluations and timings; shards are left to the functions below."""
    run = Run(path, load_run_config(path))
    manifests, steps = {}, []
    for iteration in range(run.config.iterations):
        for stage in STAGES:
            manifest = run.manifest(iteration, stage)
            if manifest is not None:
                manifests[iteration, stage] = manifest
        if (iteration, "train") in manifests:
            steps += [{**row, "iteration": iteration} for row in read_metrics(run, iteration)]
    scores = {k: require_scores(path, k) for k in evaluated_iterations(path)}
    return Truth(run, manifests, steps, scores, read_timings(path))


def read_metrics(run: Run, iteration: int) -> list[dict]:
    """Lines of a committed train stage's metrics.jsonl.

    Raises:
        LedgerError: a line is not a JSON object.
    """
    path = run.iteration_folder(iteration) / "train" / "metrics.jsonl"
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise LedgerError(f"{path}, line {number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise LedgerError(f"{path}, line {number}: not a JSON object")
        rows.append(row)
    return rows


def numbers(row: dict) -> dict[str, float]:
    """The finite numeric entries of a metrics line, without its counters."""
    return {
        name: float(value)
        for name, value in row.items()
        if name not in ("step", "iteration", "schema")
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    }


@dataclass(frozen=True)
class Sample:
    """One image of a group with its score; `advantage` as in training, 0 in a group without spread.

    Methods that do not score the prompt's tokens have none.
    """

    image: np.ndarray
    reward: float
    advantage: float
    tokens: list[str]
    token_log_probs: list[float]
    correct: bool | None


@dataclass(frozen=True)
class Group:
    """The images of one prompt, best reward first."""

    iteration: int
    prompt: str
    samples: list[Sample]


@dataclass(frozen=True)
class Judged:
    """One image with what the judge said of its regions."""

    image: np.ndarray
    prompt: str
    correct: bool | None
    score: RewardRecord


def first_shard(truth: Truth, iteration: int) -> tuple[list[RolloutRecord], dict[str, RewardRecord]]:
    """Rollouts and rewards (by key) of the first shard of an iteration that is not empty."""
    run = truth.run
    rollout, reward = (truth.manifests[iteration, stage] for stage in ("rollout", "reward"))
    index = next(i for i, info in enumerate(rollout.shards) if info.count)
    rollouts = read_records(run.stage_folder(iteration, "rollout"), [rollout.shards[index]], RolloutRecord)
    rewards = read_records(run.stage_folder(iteration, "reward"), [reward.shards[index]], RewardRecord)
    return list(rollouts), {r.key: r for r in rewards}


def detector_accuracy(rollouts: list[RolloutRecord]) -> float | None:
    """Share of correct images; None unless an exact detector can judge all prompts."""
    if not rollouts or not all(is_shapes_prompt(r.prompt) for r in rollouts):
        return None
    return sum(bool(_correct(r)) for r in rollouts) / len(rollouts)


def _correct(rollout: RolloutRecord) -> bool | None:
    if not is_shapes_prompt(rollout.prompt):
        return None
    from unified_rl.shapes.world import is_correct

    return bool(is_correct(rollout.image, rollout.prompt.metadata))


def widest_group(
    truth: Truth, iteration: int, rollouts: list[RolloutRecord], rewards: dict[str, RewardRecord]
) -> Group | None:
    """The fully scored group of two images or more whose rewards spread most.

    None when there is none, or when training does not compare images because each is weighted by a map of its own.
    """
    if truth.config.policy.objective == "reward_weighted" and any("reward_map" in r.tensors for r in rewards.values()):
        return None
    groups: dict[str, list[RolloutRecord]] = {}
    for record in rollouts:
        groups.setdefault(record.prompt.prompt_id, []).append(record)
    whole = [g for g in groups.values() if len(g) > 1]
    scored = [g for g in whole if all(r.key in rewards and rewards[r.key].status == "ok" for r in g)]
    if not scored:
        return None
    widest = max(scored, key=lambda g: _deviation([rewards[r.key].reward for r in g]))
    values = [rewards[r.key].reward for r in widest]
    mean, deviation, policy = sum(values) / len(values), _deviation(values), truth.config.policy
    live = deviation > 0 and deviation >= policy.min_std
    samples = []
    for record in widest:
        score = rewards[record.key]
        advantage = (score.reward - mean) / (deviation + policy.std_eps) if live else 0.0
        log_probs = score.tensors["token_log_probs"].tolist() if score.tokens else []
        samples.append(Sample(record.image, score.reward, advantage, score.tokens, log_probs, _correct(record)))
    return Group(iteration, widest[0].prompt.text, sorted(samples, key=lambda s: -s.reward))


def judged_ends(
    rollouts: list[RolloutRecord], rewards: dict[str, RewardRecord], each: int = JUDGED_EACH
) -> tuple[list[Judged], list[Judged]]:
    """Images whose regions were judged: the best from the best on, and the worst from the worst on.

    At most one image of a prompt in either, and none in both.
    """
    judged = [
        Judged(r.image, r.prompt.text, _correct(r), rewards[r.key])
        for r in rollouts
        if r.key in rewards and rewards[r.key].status == "ok" and rewards[r.key].regions
    ]
    ranked = sorted(judged, key=lambda j: -j.score.reward)
    best = _one_a_prompt(ranked)[:each]
    shown = {j.score.key for j in best}
    worst = _one_a_prompt([j for j in reversed(ranked) if j.score.key not in shown])[:each]
    return best, worst


def _one_a_prompt(judged: list[Judged]) -> list[Judged]:
    first: dict[str, Judged] = {}
    for item in judged:
        first.setdefault(item.score.prompt_id, item)
    return list(first.values())


def srum_means(rewards: dict[str, RewardRecord]) -> dict[str, float]:
    """Means of SRUM's components over the images that have them, by tag; empty for another method."""
    records = list(rewards.values())
    if not any("reward_map" in r.tensors for r in records):
        return {}
    means = {"srum/failed_share": sum(r.status == "failed" for r in records) / len(records)}
    for name, tag in SRUM_MEANS.items():
        values = [r.components[name] for r in records if name in r.components]
        if values:
            means[tag] = math.fsum(values) / len(values)
    regions = [region for r in records for region in r.regions]
    if regions:
        means["srum/unread_region_share"] = sum(region["score"] is None for region in regions) / len(regions)
    return means


def _deviation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))


def spread(items: list, count: int) -> list:
    """At most `count` items, evenly spaced, first and last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def pictured_prompts(scores: dict) -> list[str]:
    """Ids of the prompts shown in pictures: the first ones of each category, whatever their scores."""
    prompts = scores["prompts"]
    groups = by_category(prompts) or {"": list(prompts)}
    each = max(1, PICTURED_PROMPTS // len(groups))
    return [p for ids in groups.values() for p in _different(ids, scores)[:each]][:PICTURED_PROMPTS]


def _different(ids: list[str], scores: dict) -> list[str]:
    first: dict[str, str] = {}
    for prompt_id in ids:
        first.setdefault(scores["prompts"][prompt_id]["text"], prompt_id)
    return list(first.values())


def evaluation_images(truth: Truth, iteration: int, prompt_ids: list[str]) -> dict[str, np.ndarray]:
    """Prompt id -> first image (uint8 [H, W, 3]) of an evaluation."""
    folder = evaluation_folder(truth.run.path, iteration)
    wanted = {f"{prompt_id}_00": prompt_id for prompt_id in prompt_ids}
    images: dict[str, np.ndarray] = {}
    for info in read_manifest(folder).shards:
        for key, members in read_shard(folder, info, RolloutRecord.MEMBERS):
            if key in wanted:
                record = RolloutRecord.from_members(key, members, str(folder / info.name))
                images[wanted[key]] = record.image
    return images
