"""The rollout stage: prompt shards in, rollout shards and their manifest out.

Shards are dealt out to the workers in turn; their content does not depend on the number of workers. The worker that
finishes last commits the manifest.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from unified_rl.config import RunConfig, loop_of, open_run
from unified_rl.disk import require_room
from unified_rl.ledger import Run
from unified_rl.records import ImageRecord, PromptRecord, RolloutRecord
from unified_rl.report.timing import append_timing
from unified_rl.rollout.groups import draw_groups, iteration_keys, iteration_prompts, rollout_sampling
from unified_rl.runtime import (
    EXIT_OK,
    EXIT_STOPPED,
    Progress,
    Ranks,
    StopRequest,
    current_ranks,
    log,
    sample_seed,
    set_cpu_threads,
    stage_arguments,
)
from unified_rl.shards import image_shards, load_images, load_prompts, write_records
from unified_rl.standby import stand_by

if TYPE_CHECKING:
    from unified_rl.backbones.load import Backbone
    from unified_rl.inquiries import InquiryRecord

    # Of some inputs: how many, their records, and counts for the shard's mark.
    Batch = tuple[int, list[RolloutRecord] | list[InquiryRecord], dict[str, int]]

STAGE = "rollout"


def main(argv: list[str] | None = None) -> int:
    """Command line of the stage."""
    arguments = stage_arguments(STAGE, "python -m unified_rl.rollout --run runs/demo --iteration 0", argv)
    config = open_run(arguments.run, arguments.recipe, arguments.overrides)
    run, ranks = Run(arguments.run, config), current_ranks()
    stand_by(run, "unified_rl.backbones.load")
    with run.lock(f"{STAGE}-{ranks.rank}"):
        return rollout(run, arguments.iteration, ranks)


def rollout(run: Run, iteration: int, ranks: Ranks) -> int:
    """Draw (or ask) this worker's shards of an iteration; commits when all workers' shards are there.

    Returns:
        EXIT_OK, or EXIT_STOPPED after a request to stop (finished shards are kept).
    """
    if run.manifest(iteration, STAGE) is not None:
        log(f"iteration {iteration} is already committed")
        return EXIT_OK
    config = run.config
    started = time.monotonic()
    inputs = iteration_inputs(config, iteration)
    size = config.rollout.groups_per_shard
    shards = [inputs[i : i + size] for i in range(0, len(inputs), size)]
    mine = [i for i in range(ranks.rank, len(shards), ranks.world_size) if run.shard_mark(iteration, STAGE, i) is None]
    policy, version = run.current_policy(iteration)
    if mine and draw_shards(run, iteration, shards, mine, policy, version, ranks) == EXIT_STOPPED:
        return EXIT_STOPPED
    loop = loop_of(config, iteration)
    manifest = run.commit_if_complete(iteration, STAGE, len(shards), version, {"loop": loop} if loop else None)
    if manifest is not None:
        append_timing(run.path, STAGE, iteration, time.monotonic() - started)
        skipped = ", ".join(f"{name} {n}" for name, n in manifest.counts.items() if name.startswith("skipped/"))
        log(
            f"iteration {iteration}: {manifest.counts['images']} images in {len(manifest.shards)} shards"
            + (f"; {skipped}" if skipped else "")
        )
    return EXIT_OK


def asks_about_files(config: RunConfig) -> bool:
    """Whether iterations are made of `data.images`, not of `data.prompts`."""
    return config.reward.method == "self_consistency" and not config.self_consistency.imageless


def iteration_inputs(config: RunConfig, iteration: int) -> list[PromptRecord] | list[str]:
    """The prompts of an iteration, or the ids of the images that are asked about."""
    count = config.data.prompts_per_iteration
    if not asks_about_files(config):
        return iteration_prompts(load_prompts(Path(config.data.prompts)), count, config.seed, iteration)
    keys = [key for _, ids in image_shards(Path(config.data.images)) for key in ids]
    return iteration_keys(keys, count, config.seed, iteration)


def draw_shards(
    run: Run,
    iteration: int,
    shards: list[list[PromptRecord]] | list[list[str]],
    mine: list[int],
    policy: Path | None,
    version: str,
    ranks: Ranks,
) -> int:
    """Make and store the shards with the indices `mine`."""
    # Imported here so that a committed iteration is passed over without loading torch.
    from unified_rl.backbones.load import load_backbone

    config, loop = run.config, loop_of(run.config, iteration)
    require_room(run, iteration)
    set_cpu_threads(config.backbone.threads)
    backbone = load_backbone(config.backbone, ranks.local_rank, policy, roles=bool(loop))
    make = {"": drawn_batches, "understanding": asked_batches, "generation": task_batches}[loop]
    folder = run.stage_folder(iteration, STAGE)
    each = 1 if loop == "understanding" else config.rollout.group_size
    total = sum(len(shards[i]) for i in mine) * each
    with StopRequest() as stop, Progress(total, "images") as bar:
        for index in mine:
            records, counts = [], Counter()
            for done, batch, counted in make(backbone, shards[index], config, iteration, version):
                if stop.requested:
                    log(f"stopped on request before shard {index}; run the same command again to go on")
                    return EXIT_STOPPED
                records += batch
                counts.update(counted)
                bar.update(done * each)
            info = write_records(folder / f"shard-{index:05d}.tar", records, may_be_empty=loop == "generation")
            run.mark_shard(iteration, STAGE, index, info, dict(counts))
            run.write_status(stage=STAGE, iteration=iteration, done=bar.done, total=total, eta_s=bar.eta_s)
    return EXIT_OK


def drawn_batches(
    backbone: Backbone, prompts: list[PromptRecord], config: RunConfig, iteration: int, version: str
) -> Iterator[Batch]:
    """Images of prompts."""
    sampling = rollout_sampling(backbone.sampling_type, config.rollout)

    def seeds_of(prompt: PromptRecord) -> list[int]:
        return [sample_seed(config.seed, iteration, prompt.prompt_id, j) for j in range(config.rollout.group_size)]

    for batch in draw_groups(
        backbone, prompts, seeds_of, sampling, config.rollout.groups_per_batch, version, config.rollout
    ):
        groups = len(batch) // config.rollout.group_size
        yield groups, batch, {"groups": groups, "images": len(batch)}


def asked_batches(
    backbone: Backbone, inputs: list[PromptRecord] | list[str], config: RunConfig, iteration: int, version: str
) -> Iterator[Batch]:
    """Questions about images, and answers."""
    from unified_rl.rollout.inquiry import inquire, skip_counts

    for images in image_batches(backbone, inputs, config, iteration):
        batch = inquire(backbone, images, config, iteration, version)
        yield len(images), batch, {"groups": len(batch), "images": len(batch), **skip_counts(batch)}


def task_batches(
    backbone: Backbone, inputs: list[PromptRecord] | list[str], config: RunConfig, iteration: int, version: str
) -> Iterator[Batch]:
    """Images of drawing tasks that were made from images; an image without a task has none."""
    from unified_rl.rollout.drawing_tasks import propose_tasks, skip_counts

    for images in image_batches(backbone, inputs, config, iteration):
        attempts = propose_tasks(backbone, images, config, iteration)
        prompts = [attempt.prompt for attempt in attempts if attempt.prompt]
        with backbone.role("generator"):
            batches = list(drawn_batches(backbone, prompts, config, iteration, version))
        drawn = [record for _, batch, _ in batches for record in batch]
        counts = {"inputs": len(images), "groups": len(prompts), "images": len(drawn), **skip_counts(attempts)}
        yield len(images), drawn, counts


def image_batches(
    backbone: Backbone, inputs: list[PromptRecord] | list[str], config: RunConfig, iteration: int
) -> Iterator[list[ImageRecord]]:
    """The images with these ids, or one that the Generator draws of each of these prompts.

    As many at a time as prompts are drawn together. A drawn image has the id of its prompt.
    """
    size = config.rollout.groups_per_batch
    parts = [inputs[start : start + size] for start in range(0, len(inputs), size)]
    if asks_about_files(config):
        images = load_images(Path(config.data.images), inputs)
        yield from ([images[key] for key in part] for part in parts)
        return

    def seeds_of(prompt: PromptRecord) -> list[int]:
        return [sample_seed(config.seed, iteration, f"{prompt.prompt_id}/imageless", 0)]

    sampling = rollout_sampling(backbone.sampling_type, config.rollout)
    for part in parts:
        with backbone.role("generator"):
            (drawn,) = draw_groups(backbone, part, seeds_of, sampling, size, "", config.rollout)
        yield [ImageRecord(record.prompt.prompt_id, record.image) for record in drawn]
