"""The reward stage: rollout shards in, reward shards and their manifest out.

The judge reads each image as it came back from its PNG.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from dataclasses import replace
from functools import partial

from unified_rl.config import loop_of, open_run
from unified_rl.inquiries import InquiryRecord, InquiryReward
from unified_rl.ledger import Run
from unified_rl.manifests import LedgerError, Manifest, ShardInfo
from unified_rl.records import RewardRecord, RolloutRecord
from unified_rl.report.timing import append_timing
from unified_rl.reward.following import SILENT_SECONDS, Arrivals
from unified_rl.reward.inquiry import InquiryState, choice_of, question_scores, rules_of, score_inquiries
from unified_rl.reward.inquiry import summary_of as inquiry_summary
from unified_rl.reward.self_consistency_metrics import choice_metrics, question_metrics
from unified_rl.runtime import (
    EXIT_OK,
    EXIT_STOPPED,
    Progress,
    Ranks,
    StageError,
    StopRequest,
    current_ranks,
    log,
    set_cpu_threads,
    stage_parser,
)
from unified_rl.shards import read_records, write_records
from unified_rl.standby import stand_by

STAGE = "reward"
SHOWN_FAILURES = 5
PARTS = ("fidelity", "contradiction", "cycle", "quality")  # of a drawing task's score, whose means are kept


class RewardError(StageError):
    """Too many images could not be scored; the message names them."""


def main(argv: list[str] | None = None) -> int:
    """Command line of the stage."""
    parser = stage_parser(STAGE, "python -m unified_rl.reward --run runs/demo --iteration 0 --follow")
    parser.add_argument("--follow", action="store_true", help="score shards while the rollout still draws others")
    parser.add_argument(
        "--follow-timeout", type=float, default=SILENT_SECONDS, metavar="SECONDS",
        help="give up after so long without a new shard and without a process at work on the rollout "
        "(default %(default).0f)",
    )  # fmt: skip
    arguments = parser.parse_intermixed_args(argv)
    config = open_run(arguments.run, arguments.recipe, arguments.overrides)
    run, ranks = Run(arguments.run, config), current_ranks()
    stand_by(run, "unified_rl.reward.judges")
    with run.lock(f"{STAGE}-{ranks.rank}"):
        return reward(run, arguments.iteration, ranks, arguments.follow_timeout if arguments.follow else None)


def reward(run: Run, iteration: int, ranks: Ranks, patience: float | None = None) -> int:
    """Score this worker's shards of an iteration; commits when all workers' shards are there.

    Args:
        patience: Follow a rollout in progress, see `Arrivals`; None: it must be committed.

    Raises:
        RewardError: more than reward.max_failed_share of the groups have a failed member.
    """
    if run.manifest(iteration, STAGE) is not None:
        log(f"iteration {iteration} is already committed")
        return EXIT_OK
    todo = Arrivals(run, iteration, ranks, patience)
    if todo.source is None:  # its workers hold the first GPUs
        workers = int(os.environ.get("WORKERS") or run.config.rollout.workers)  # as launch/rollout.sh counts them
        ranks = replace(ranks, local_rank=ranks.local_rank + workers)
    score = score_inquiry_shards if loop_of(run.config, iteration) == "understanding" else score_shards
    if not todo.finished and score(run, iteration, todo, ranks) == EXIT_STOPPED:
        return EXIT_STOPPED
    source = todo.source
    check_failures(run, iteration, source)

    extra = partial(manifest_extra, run, iteration, source)
    digests = [shard.sha256 for shard in source.shards]
    manifest = run.commit_if_complete(iteration, STAGE, len(digests), source.policy_version, extra, digests)
    if manifest is not None:
        append_timing(run.path, STAGE, iteration, time.monotonic() - todo.committed_at)
        mean = manifest.extra.get("reward_mean")
        shown = "nothing has a score" if mean is None else f"mean reward {mean:.4f}"
        log(f"iteration {iteration}: {manifest.counts['images']} images, {shown}")
    return EXIT_OK


def state_before(run: Run, iteration: int) -> InquiryState:
    """What the understanding iterations before this one left behind.

    Raises:
        LedgerError: the last of them is not scored, or its state cannot be read.
    """
    earlier = [k for k in range(iteration) if loop_of(run.config, k) == "understanding"]
    if not earlier:
        return InquiryState.start()
    manifest = run.require_manifest(earlier[-1], STAGE)
    try:
        return InquiryState.from_dict(manifest.extra["state"])
    except (KeyError, TypeError, ValueError) as error:
        raise LedgerError(
            f"the reward manifest of iteration {earlier[-1]} has no usable state ({error}); delete that stage and all "
            "later ones to redo them"
        ) from None


def manifest_extra(run: Run, iteration: int, source: Manifest, shards: list[ShardInfo]) -> dict:
    """The loop of an iteration; after understanding also state and metrics, from its rewards in their order.

    Raises:
        RewardError: see `check_failures`; a worker that ended after the last check may have brought further ones.
    """
    check_failures(run, iteration, source)
    loop = loop_of(run.config, iteration)
    if loop != "understanding":
        return {"loop": loop} if loop else {}
    rewards = list(read_records(run.stage_folder(iteration, STAGE), shards, InquiryReward))
    scores = [score for reward in rewards for score in question_scores(reward)]
    state = state_before(run, iteration).after(scores, rules_of(run.config.self_consistency))
    metrics = question_metrics(scores) | choice_metrics([choice_of(reward) for reward in rewards])
    return {"loop": loop, "state": state.to_dict(), "metrics": metrics}


def score_inquiry_shards(run: Run, iteration: int, todo: Arrivals, ranks: Ranks) -> int:
    """Score and store the questions of the shards of `todo`; no model is needed."""
    state = state_before(run, iteration)
    with StopRequest() as stop:
        for index, source in todo.until(stop):
            asked = list(read_records(run.stage_folder(iteration, "rollout"), [source], InquiryRecord))
            records = score_inquiries(asked, state, run.config.self_consistency)
            info = write_records(run.stage_folder(iteration, STAGE) / f"shard-{index:05d}.tar", records)
            run.mark_shard(iteration, STAGE, index, info, inquiry_summary(records), source.sha256)
    return EXIT_OK if todo.finished else EXIT_STOPPED


def score_shards(run: Run, iteration: int, todo: Arrivals, ranks: Ranks) -> int:
    """Score and store the shards of `todo`."""
    # Imported here so that a committed iteration is passed over without loading torch.
    from unified_rl.reward.judges import Judges

    config = run.config
    set_cpu_threads(config.backbone.threads)
    judges = Judges(run, iteration, ranks)
    total = todo.images()
    # Whole groups: some scores compare the images of a prompt.
    size = max(1, config.reward.batch_size // config.rollout.group_size) * config.rollout.group_size
    if config.reward.method != "self_consistency":
        size = config.reward.batch_size
    with StopRequest() as stop, Progress(total, "scores") as bar:
        for index, source in todo.until(stop):
            rollouts = list(read_records(run.stage_folder(iteration, "rollout"), [source], RolloutRecord))
            records: list[RewardRecord] = []
            for start in range(0, len(rollouts), size):
                if stop.requested:
                    log(f"stopped on request before shard {index}; run the same command again to go on")
                    return EXIT_STOPPED
                records += judges.score(rollouts[start : start + size])
                bar.update(min(size, len(rollouts) - start))
            name = f"shard-{index:05d}.tar"
            info = write_records(run.stage_folder(iteration, STAGE) / name, records, may_be_empty=not rollouts)
            run.mark_shard(iteration, STAGE, index, info, summary_of(records, config.reward.method), source.sha256)
            run.write_status(stage=STAGE, iteration=iteration, done=bar.done, total=total, eta_s=bar.eta_s)
    return EXIT_OK if todo.finished else EXIT_STOPPED


def summary_of(records: list[RewardRecord], method: str) -> dict:
    """Counts, sums and failures of one shard, for its mark."""
    good = [r for r in records if r.status == "ok"]
    failures = [{"key": r.key, "reason": r.reason} for r in records if r.status == "failed"]
    summary = {
        "groups": len({r.prompt_id for r in records}),
        "images": len(records),
        "failed": len(failures),
        "failures": failures,
    }
    skipped = Counter(r.reason.partition(":")[0] for r in records if r.status == "skipped")
    if skipped:
        summary["skipped"] = skipped.total()
    if good or failures:
        summary["reward_sum"] = math.fsum(r.reward for r in good)
    if method == "self_consistency" and good:
        summary |= {f"{part}_sum": math.fsum(r.components[part] for r in good) for part in PARTS}
        summary |= {f"skipped/{reason}": n for reason, n in skipped.items()}
    return summary


def check_failures(run: Run, iteration: int, source: Manifest) -> None:
    """Raise when too large a share of the groups scored so far has a failed member."""
    marks = [run.shard_mark(iteration, STAGE, i, shard.sha256) for i, shard in enumerate(source.shards)]
    failures = [failure for mark in marks if mark for failure in mark["failures"]]
    asked = loop_of(run.config, iteration) == "understanding"  # scores of whole images, not of samples of a prompt
    groups = {failure["key"] if asked else failure["key"].rpartition("_")[0] for failure in failures}
    allowed = run.config.reward.max_failed_share * source.counts["groups"]
    if len(groups) > allowed:
        shown = "; ".join(f"{f['key']}: {f['reason']}" for f in failures[:SHOWN_FAILURES])
        raise RewardError(
            f"{len(groups)} of {source.counts['groups']} groups of iteration {iteration} have a failed score, more "
            f"than reward.max_failed_share={run.config.reward.max_failed_share} allows. First: {shown}. Mend the "
            f"cause, delete {run.stage_folder(iteration, STAGE)} and run the stage again"
        )
