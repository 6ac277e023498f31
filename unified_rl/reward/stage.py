"""The reward stage: rollout shards in, reward shards and their manifest out.

The judge reads each image as it came back from its PNG. The reference policy's log-probs of the drawn tokens are
computed here as well, so that training holds one model only.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from unified_rl.config import RunConfig, open_run
from unified_rl.ledger import Run
from unified_rl.manifests import Manifest
from unified_rl.records import RewardRecord, RolloutRecord
from unified_rl.report.timing import append_timing
from unified_rl.runtime import (
    EXIT_OK,
    EXIT_STOPPED,
    Ranks,
    StageError,
    StopRequest,
    current_ranks,
    log,
    progress,
    set_cpu_threads,
    stage_arguments,
)
from unified_rl.shards import read_records, write_records

if TYPE_CHECKING:
    import torch

    from unified_rl.backbones.janus import JanusBackbone
    from unified_rl.reward.gvu import GvuScore

STAGE = "reward"
SHOWN_FAILURES = 5


class RewardError(StageError):
    """Too many images could not be scored; the message names them."""


def main(argv: list[str] | None = None) -> int:
    """Command line of the stage."""
    arguments = stage_arguments(STAGE, "python -m unified_rl.reward --run runs/demo --iteration 0", argv)
    config = open_run(arguments.run, arguments.recipe, arguments.overrides)
    run, ranks = Run(arguments.run, config), current_ranks()
    with run.lock(f"{STAGE}-{ranks.rank}"):
        return reward(run, arguments.iteration, ranks)


def reward(run: Run, iteration: int, ranks: Ranks) -> int:
    """Score this worker's shards of an iteration; commits when all workers' shards are there.

    Raises:
        RewardError: more than reward.max_failed_share of the groups have a failed member.
    """
    if run.manifest(iteration, STAGE) is not None:
        log(f"iteration {iteration} is already committed")
        return EXIT_OK
    started = time.monotonic()
    source = run.require_manifest(iteration, "rollout")
    indices = range(ranks.rank, len(source.shards), ranks.world_size)
    mine = [i for i in indices if run.shard_mark(iteration, STAGE, i) is None]
    if mine and score_shards(run, iteration, source, mine, ranks) == EXIT_STOPPED:
        return EXIT_STOPPED
    check_failures(run, iteration, source)
    manifest = run.commit_if_complete(iteration, STAGE, len(source.shards), source.policy_version)
    if manifest is not None:
        append_timing(run.path, STAGE, iteration, time.monotonic() - started)
        mean = manifest.extra["reward_mean"]
        log(f"iteration {iteration}: {manifest.counts['images']} images, mean reward {mean:.4f}")
    return EXIT_OK


class Judges:
    """The models that score: the frozen base weights, and for a live judge the current policy as well."""

    def __init__(self, run: Run, iteration: int, ranks: Ranks) -> None:
        from unified_rl.backbones.load import load_backbone

        self.config: RunConfig = run.config
        self.base: JanusBackbone = load_backbone(run.config.backbone, ranks.local_rank)
        self.live: JanusBackbone | None = None
        if run.config.reward.judge == "live":
            policy, _ = run.current_policy(iteration)
            self.live = load_backbone(run.config.backbone, ranks.local_rank, policy) if policy else self.base

    def score(self, rollouts: list[RolloutRecord]) -> list[RewardRecord]:
        """Reward records of rollouts that share their sampling settings."""
        from unified_rl.reward.gvu import gvu_scores

        images = [r.image for r in rollouts]
        prompts = [r.prompt.text for r in rollouts]
        question = self.config.reward.question
        frozen = gvu_scores(self.base, images, prompts, question)
        live = gvu_scores(self.live, images, prompts, question) if self.live else [None] * len(rollouts)
        reference = self.reference_log_probs(rollouts)
        return [
            reward_record(rollout, self.config, *scores)
            for rollout, *scores in zip(rollouts, frozen, live, reference, strict=True)
        ]

    def reference_log_probs(self, rollouts: list[RolloutRecord]) -> torch.Tensor:
        """fp32 [B, S] log-probs of the drawn tokens under the base weights."""
        import torch

        from unified_rl.backbones.base import Sampling

        sampling = Sampling.from_dict(rollouts[0].sampling)
        actions = torch.stack([r.tensors["actions"] for r in rollouts]).long().to(self.base.device)
        with torch.inference_mode():
            return self.base.image_dist([r.prompt.text for r in rollouts], actions, sampling).log_prob(actions).cpu()


def reward_record(
    rollout: RolloutRecord, config: RunConfig, frozen: GvuScore, live: GvuScore | None, reference: torch.Tensor
) -> RewardRecord:
    """The record of one image; a score that is not finite is a failure with its reason, never a number."""
    score = live or frozen
    base = {"key": rollout.key, "prompt_id": rollout.prompt.prompt_id, "policy_version": rollout.policy_version}
    problem = ""
    if not score.tokens:
        problem = "the prompt has no tokens to score"
    elif not all(math.isfinite(s.mean_log_prob) for s in (frozen, score)):
        problem = "the judge gave a non-finite log-likelihood"
    elif not bool(reference.isfinite().all()):
        problem = "the reference policy gave a non-finite log-prob"
    if problem:
        return RewardRecord(**base, status="failed", reward=None, components={}, reason=problem)
    components = {"likelihood": score.geometric_mean, "log_likelihood": score.mean_log_prob}
    if live is not None:
        components["frozen_likelihood"] = frozen.geometric_mean
    value = components["likelihood" if config.reward.domain == "probability" else "log_likelihood"]
    tensors = {"token_log_probs": score.token_log_probs, "reference_log_probs": reference.float().clone()}
    return RewardRecord(**base, status="ok", reward=value, components=components, tokens=score.tokens, tensors=tensors)


def score_shards(run: Run, iteration: int, source: Manifest, mine: list[int], ranks: Ranks) -> int:
    """Score and store the shards with the indices `mine`."""
    config = run.config
    set_cpu_threads(config.backbone.threads)
    judges = Judges(run, iteration, ranks)
    total = sum(source.shards[i].count for i in mine)
    with StopRequest() as stop, progress(total, "scores") as bar:
        for index in mine:
            rollouts = list(read_records(run.stage_folder(iteration, "rollout"), [source.shards[index]], RolloutRecord))
            records: list[RewardRecord] = []
            for start in range(0, len(rollouts), config.reward.batch_size):
                if stop.requested:
                    log(f"stopped on request before shard {index}; run the same command again to go on")
                    return EXIT_STOPPED
                records += judges.score(rollouts[start : start + config.reward.batch_size])
                bar.update(min(config.reward.batch_size, len(rollouts) - start))
            info = write_records(run.stage_folder(iteration, STAGE) / f"shard-{index:05d}.tar", records)
            run.mark_shard(iteration, STAGE, index, info, summary_of(records))
            run.write_status(stage=STAGE, iteration=iteration, done=bar.done, total=total, eta_s=bar.eta_s)
    return EXIT_OK


def summary_of(records: list[RewardRecord]) -> dict:
    """Counts, sums and failures of one shard, for its mark."""
    good = [r for r in records if r.status == "ok"]
    failures = [{"key": r.key, "reason": r.reason} for r in records if r.status == "failed"]
    return {
        "groups": len({r.prompt_id for r in records}),
        "images": len(records),
        "failed": len(failures),
        "failures": failures,
        "reward_sum": math.fsum(r.reward for r in good),
    }


def check_failures(run: Run, iteration: int, source: Manifest) -> None:
    """Raise when too large a share of the groups scored so far has a failed member."""
    marks = [run.shard_mark(iteration, STAGE, i) for i in range(len(source.shards))]
    failures = [failure for mark in marks if mark for failure in mark["failures"]]
    groups = {failure["key"].rpartition("_")[0] for failure in failures}
    allowed = run.config.reward.max_failed_share * source.counts["groups"]
    if len(groups) > allowed:
        shown = "; ".join(f"{f['key']}: {f['reason']}" for f in failures[:SHOWN_FAILURES])
        raise RewardError(
            f"{len(groups)} of {source.counts['groups']} groups of iteration {iteration} have a failed score, more "
            f"than reward.max_failed_share={run.config.reward.max_failed_share} allows. First: {shown}. Mend the "
            f"cause, delete {run.stage_folder(iteration, STAGE)} and run the stage again"
        )
