"""The reward stage: rollout shards in, reward shards and their manifest out.

The judge reads each image as it came back from its PNG.
"""

from __future__ import annotations

import math
import time

from unified_rl.config import open_run
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


def score_shards(run: Run, iteration: int, source: Manifest, mine: list[int], ranks: Ranks) -> int:
    """Score and store the shards with the indices `mine`."""
    # Imported here so that a committed iteration is passed over without loading torch.
    from unified_rl.reward.judges import Judges

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
