"""How cost grows with images per prompt, prompts, ranks and records; more than in proportion is a fault.

- images per prompt: drawing 1 to 64 images of one prompt with the tiny Janus.
- prompts: reading their shards and choosing an iteration's, 100 to 100,000.
- ranks: scoring's book-keeping of one iteration by 1, 2 and 3 workers, all of them together.
- records: a run folder with 1,000 to 1,000,000 of them: opening (what is left to do), status, resuming (every shard is
  verified). The shards are copies of one, by hard links, so that building the folder is not what takes the time.

`ours` is seconds at the larger size, `theirs` what proportion to the smaller one allows; their ratio has to stay below
1.5, as small sizes have noise and large ones leave the caches. Records have a second promise: below one second for
100,000.

example: python -m benchmarks.growth --records 1000 10000 100000 --prompts 100 1000 10000
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import measuring
from benchmarks.measuring import Row
from unified_rl.backbones.base import Sampling
from unified_rl.backbones.janus import JanusBackbone
from unified_rl.config import RunConfig, open_run
from unified_rl.launching import remaining_stages
from unified_rl.ledger import Run
from unified_rl.manifests import Manifest, ShardInfo, write_manifest
from unified_rl.records import PromptRecord, RolloutRecord
from unified_rl.rollout.groups import iteration_prompts
from unified_rl.shards import load_prompts, write_records
from unified_rl.status import status_text

TINY = Path("unified_rl/assets/tiny_janus")
SLACK = 1.5
# Records of an iteration: few, so that all sizes have committed iterations to open; many, where the shards of the last
# one are verified.
FEW, MANY = 250, 10_000
PER_SHARD = 50
GROUP = 5


def proportion(case: str, sizes: Sequence[int], seconds: Sequence[float]) -> list[Row]:
    """A row for each size but the first: seconds against what the size before it lets expect."""
    rows = []
    for i in range(1, len(sizes)):
        allowed = seconds[i - 1] * sizes[i] / sizes[i - 1]
        rows.append(Row("growth", f"{case}, {sizes[i]}, at most", seconds[i] / allowed, SLACK, seconds[i], allowed))
    return rows


def measured(functions: Sequence[Callable[[], object]], arguments: Namespace, often: int = 1) -> list[float]:
    """Median seconds of each, of `often` times as many repeats: what takes a tenth of a second needs more of them."""
    return [measuring.median_seconds(function, often * arguments.repeats, arguments.clock) for function in functions]


def images_per_prompt(arguments: Namespace) -> list[Row]:
    """Drawing with the tiny Janus."""
    backbone = JanusBackbone.from_pretrained(TINY)
    draw = [
        partial(backbone.rollout_images, ["a photo of a red circle"], range(size), Sampling())
        for size in arguments.images
    ]
    return proportion("images per prompt", arguments.images, measured(draw, arguments))


def prompts(arguments: Namespace, folder: Path) -> list[Row]:
    """Reading and choosing."""

    def choose(where: Path) -> list[PromptRecord]:
        return iteration_prompts(load_prompts(where), 64, 0, 0)

    places = []
    for count in arguments.prompts:
        place = folder / f"prompts-{count}"
        place.mkdir()
        records = [PromptRecord(f"p{i:07d}", f"a photo of {i} circles") for i in range(count)]
        parts = [records[start : start + 10_000] for start in range(0, count, 10_000)]
        infos = [write_records(place / f"prompts-{i:05d}.tar", part) for i, part in enumerate(parts)]
        write_manifest(place, Manifest("prompts", 0, infos, "base", "", {"prompts": count}))
        places.append(place)
    return proportion("prompts", arguments.prompts, measured([partial(choose, p) for p in places], arguments))


def one_shard(folder: Path) -> Path:
    """A real shard of PER_SHARD images."""
    actions = {"actions": torch.arange(16).int(), "log_probs": torch.full((16,), -1.0)}
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    records = [
        RolloutRecord(PromptRecord(f"p{i // GROUP:05d}", "a photo of a ring"), i % GROUP, i, "base",
                      Sampling().to_dict(), image, actions)
        for i in range(PER_SHARD)
    ]  # fmt: skip
    write_records(folder / "shard.tar", records)
    return folder / "shard.tar"


def new_run(path: Path, records: int, each: int) -> RunConfig:
    """The configuration of a run of as many iterations as it takes, stored in its folder."""
    return open_run(
        path, "gvu_janus_shapes",
        [f"iterations={-(-records // each) + 1}", f"data.prompts_per_iteration={each // GROUP}",
         f"rollout.group_size={GROUP}", f"rollout.groups_per_shard={PER_SHARD // GROUP}"],
    )  # fmt: skip


def make_run(path: Path, records: int, each: int, shard: Path) -> Run:
    """A run with that many rollout records, at most `each` in an iteration; the last one has its shards and marks, but
    no manifest.
    """
    run = Run(path, new_run(path, records, min(records, each)))
    data, version = shard.read_bytes(), "base"
    digest, last = hashlib.sha256(data).hexdigest(), run.config.iterations - 2
    count = run.config.data.prompts_per_iteration * GROUP // PER_SHARD
    infos = [ShardInfo(f"shard-{i:05d}.tar", PER_SHARD, digest, len(data)) for i in range(count)]
    for iteration in range(last + 1):
        folder = run.stage_folder(iteration, "rollout")
        for i, info in enumerate(infos):
            os.link(shard, folder / info.name)
            if iteration == last:
                run.mark_shard(iteration, "rollout", i, info, {"groups": PER_SHARD // GROUP, "images": PER_SHARD})
        if iteration < last:
            counts = {"groups": count * PER_SHARD // GROUP, "images": count * PER_SHARD}
            run.commit(Manifest("rollout", iteration, infos, version, run.config_hash, counts))
            run.commit(Manifest("reward", iteration, [], version, run.config_hash, {"failed": 0, **counts}))
            run.policy_folder(iteration).mkdir()
            run.commit(Manifest("train", iteration, [], version, run.config_hash, {}, [], {"policy_sha256": digest}))
            version = run.current_policy(iteration + 1)[1]
    return run


def resume(run: Run, workers: int = 1) -> None:
    """What rollout workers do before they draw: verify the shards that are there."""
    iteration = run.config.iterations - 2
    count = run.config.data.prompts_per_iteration * GROUP // PER_SHARD
    for rank in range(workers):
        assert all(run.shard_mark(iteration, "rollout", i) is not None for i in range(rank, count, workers))


def records(arguments: Namespace, folder: Path) -> list[Row]:
    """Opening, status, resuming; and resuming by several workers."""
    shard = one_shard(folder)
    many, few = (  # iterations
        [make_run(folder / f"{each}-{count}", count, each, shard) for count in arguments.records]
        for each in (FEW, MANY)
    )
    rows = []
    for name, function, runs in (
        ("opening", remaining_stages, many),
        ("status", lambda run: status_text(run.path), many),
        ("resuming", resume, few),
    ):
        seconds = measured([partial(function, run) for run in runs], arguments)
        rows += proportion(f"records, {name}", arguments.records, seconds)
        size, last = arguments.records[-1], seconds[-1]
        allowed = max(1.0, size / 1e5)
        rows.append(Row("growth", f"records, {name}, {size}, seconds, at most", last / allowed, 1.0, last, allowed))
    seconds = measured([partial(resume, few[-1], workers) for workers in arguments.ranks], arguments, often=5)
    return rows + [
        Row("growth", f"ranks, {n} verify together, at most", other / seconds[0], SLACK, other, seconds[0])
        for n, other in zip(arguments.ranks[1:], seconds[1:], strict=True)
    ]


def main(argv: list[str] | None = None) -> None:
    """All tables."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4, 16, 64], help="per prompt")
    parser.add_argument("--prompts", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--records", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    folder = Path(tempfile.mkdtemp())
    try:
        measuring.report(images_per_prompt(arguments), arguments.out)
        measuring.report(prompts(arguments, folder), arguments.out)
        measuring.report(records(arguments, folder), arguments.out)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
