"""The rollout stage: prompt shards in, rollout shards and their manifest out.

Shards are dealt out to the workers in turn; their content does not depend on the number of workers. The worker that
finishes last commits the manifest.
"""

from __future__ import annotations

import time
from pathlib import Path

from unified_rl.config import open_run
from unified_rl.ledger import Run
from unified_rl.records import PromptRecord
from unified_rl.report.timing import append_timing
from unified_rl.rollout.groups import draw_groups, iteration_prompts, rollout_sampling
from unified_rl.runtime import (
    EXIT_OK,
    EXIT_STOPPED,
    Ranks,
    StopRequest,
    current_ranks,
    log,
    progress,
    sample_seed,
    set_cpu_threads,
    stage_arguments,
)
from unified_rl.shards import load_prompts, write_records

STAGE = "rollout"


def main(argv: list[str] | None = None) -> int:
    """Command line of the stage."""
    arguments = stage_arguments(STAGE, "python -m unified_rl.rollout --run runs/demo --iteration 0", argv)
    config = open_run(arguments.run, arguments.recipe, arguments.overrides)
    run, ranks = Run(arguments.run, config), current_ranks()
    with run.lock(f"{STAGE}-{ranks.rank}"):
        return rollout(run, arguments.iteration, ranks)


def rollout(run: Run, iteration: int, ranks: Ranks) -> int:
    """Draw this worker's shards of an iteration; commits when all workers' shards are there.

    Returns:
        EXIT_OK, or EXIT_STOPPED after a request to stop (finished shards are kept).
    """
    if run.manifest(iteration, STAGE) is not None:
        log(f"iteration {iteration} is already committed")
        return EXIT_OK
    config = run.config
    started = time.monotonic()
    prompts = iteration_prompts(
        load_prompts(Path(config.data.prompts)), config.data.prompts_per_iteration, config.seed, iteration
    )
    size = config.rollout.groups_per_shard
    shards = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    mine = [i for i in range(ranks.rank, len(shards), ranks.world_size) if run.shard_mark(iteration, STAGE, i) is None]
    policy, version = run.current_policy(iteration)
    if mine and draw_shards(run, iteration, shards, mine, policy, version, ranks) == EXIT_STOPPED:
        return EXIT_STOPPED
    manifest = run.commit_if_complete(iteration, STAGE, len(shards), version)
    if manifest is not None:
        append_timing(run.path, STAGE, iteration, time.monotonic() - started)
        log(f"iteration {iteration}: {manifest.counts['images']} images in {len(manifest.shards)} shards")
    return EXIT_OK


def draw_shards(
    run: Run,
    iteration: int,
    shards: list[list[PromptRecord]],
    mine: list[int],
    policy: Path | None,
    version: str,
    ranks: Ranks,
) -> int:
    """Draw and store the shards with the indices `mine`."""
    # Imported here so that a committed iteration is passed over without loading torch.
    from unified_rl.backbones.load import load_backbone

    config = run.config
    set_cpu_threads(config.backbone.threads)
    backbone = load_backbone(config.backbone, ranks.local_rank, policy)
    sampling = rollout_sampling(backbone.sampling_type, config.rollout)
    folder = run.stage_folder(iteration, STAGE)

    def seeds_of(prompt: PromptRecord) -> list[int]:
        return [sample_seed(config.seed, iteration, prompt.prompt_id, j) for j in range(config.rollout.group_size)]

    total = sum(len(shards[i]) for i in mine) * config.rollout.group_size
    with StopRequest() as stop, progress(total, "images") as bar:
        for index in mine:
            records = []
            for batch in draw_groups(
                backbone, shards[index], seeds_of, sampling, config.rollout.groups_per_batch, version, config.rollout
            ):
                if stop.requested:
                    log(f"stopped on request before shard {index}; run the same command again to go on")
                    return EXIT_STOPPED
                records += batch
                bar.update(len(batch))
            info = write_records(folder / f"shard-{index:05d}.tar", records)
            run.mark_shard(iteration, STAGE, index, info, {"groups": len(shards[index]), "images": len(records)})
            run.write_status(stage=STAGE, iteration=iteration, done=bar.done, total=total, eta_s=bar.eta_s)
    return EXIT_OK
