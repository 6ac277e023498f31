"""TensorBoard logs, rebuilt from the run folder.

All events are written into a new file and the old ones are then deleted. The new file begins with a purge mark for
step 0, so that a TensorBoard that has the old file open drops its points instead of showing them twice.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unified_rl.config import loop_of
from unified_rl.report.figures import evaluation_grid, group_strips, group_view
from unified_rl.report.inquiries import questions_table, tasks_table
from unified_rl.report.overlay import overlay_sheet
from unified_rl.report.truth import (
    Truth,
    detector_accuracy,
    first_shard,
    judged_ends,
    numbers,
    spread,
    srum_means,
    widest_group,
)

if TYPE_CHECKING:
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

PICTURED_ITERATIONS = 8


def iteration_scalars(truth: Truth, iteration: int) -> Iterator[tuple[str, float]]:
    """Scalars of one training iteration, from its manifests and timings."""
    for stage in ("rollout", "reward", "train"):
        manifest = truth.manifests.get((iteration, stage))
        if manifest is None:
            continue
        skips = ((n, count) for n, count in manifest.counts.items() if n.startswith(("skipped/", "dropped/")))
        yield from ((f"iteration/{stage}_{n}", count) for n, count in skips)
        seconds = truth.seconds.get((stage, iteration))
        if seconds is not None:
            yield f"iteration/{stage}_s", seconds
            if seconds > 0 and "images" in manifest.counts:
                yield f"iteration/{stage}_images_per_s", manifest.counts["images"] / seconds
        if stage == "reward":
            yield "iteration/failed_scores", manifest.counts.get("failed", 0)
            yield from ((f"iteration/{n}", mean) for n, mean in manifest.extra.items() if n.endswith("_mean"))
            yield from manifest.extra.get("metrics", {}).items()
        if stage == "train":
            yield from ((f"iteration/{n}", count) for n, count in manifest.counts.items() if "groups_" in n)
            share = zero_std_share(manifest.counts)
            if share is not None:
                yield "iteration/zero_std_share", share


def zero_std_share(counts: dict[str, int]) -> float | None:
    """Share of the scored groups whose rewards do not differ."""
    scored = counts.get("groups_used", 0) + counts.get("groups_zero_std", 0)
    return counts.get("groups_zero_std", 0) / scored if scored else None


def write_scalars(writer: SummaryWriter, truth: Truth) -> None:
    """All scalars: those of metrics.jsonl under their own names by optimiser step (from 1), the rest by iteration."""
    for step, row in enumerate(truth.steps, 1):
        for name, value in numbers(row).items():
            writer.add_scalar(name, value, step)
    for iteration in truth.iterations("rollout"):
        for name, value in iteration_scalars(truth, iteration):
            writer.add_scalar(name, value, iteration)
    for iteration, scores in truth.scores.items():
        for name, value in scores.items():
            if isinstance(value, float):
                writer.add_scalar(f"eval/{name}", value, iteration)


def write_pictures(writer: SummaryWriter, truth: Truth) -> None:
    """Image grids of evaluations; of a few evenly spaced iterations what the first shard shows of the judge."""
    for iteration in spread(sorted(truth.scores), PICTURED_ITERATIONS):
        writer.add_image(
            "evaluation/fixed_prompts",
            pixels(evaluation_grid(truth, iteration)),
            iteration,
            dataformats="HWC",
        )
    for iteration in spread(truth.scored("understanding"), PICTURED_ITERATIONS):
        if loop_of(truth.config, iteration) == "understanding":
            writer.add_text("inquiry/questions", questions_table(truth, iteration), iteration)
    for iteration in spread(truth.scored(), PICTURED_ITERATIONS):
        rollouts, rewards = first_shard(truth, iteration)
        if loop_of(truth.config, iteration):
            writer.add_text("inquiry/drawing_tasks", tasks_table(rollouts, rewards), iteration)
        accuracy = detector_accuracy(rollouts)
        if accuracy is not None:
            writer.add_scalar("iteration/detector_accuracy_first_shard", accuracy, iteration)
        group = widest_group(truth, iteration, rollouts, rewards)
        if group is not None:
            writer.add_image("group/by_advantage", pixels(group_view(group)), iteration, dataformats="HWC")
            if group.samples[0].tokens:
                writer.add_image("group/token_likelihood", pixels(group_strips(group)), iteration, dataformats="HWC")
        for tag, mean in srum_means(rewards).items():
            writer.add_scalar(tag, mean, iteration)
        for name, judged in zip(("best", "worst"), judged_ends(rollouts, rewards), strict=True):
            if judged:
                writer.add_image(f"srum/{name}", pixels(overlay_sheet(judged)), iteration, dataformats="HWC")


def pixels(picture: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return np.asarray(picture)


def write_tensorboard(truth: Truth) -> Path:
    """Rebuild `RUN/tensorboard`; returns the folder.

    Raises:
        OSError: it could not be written; the error names it, which the writer's own does not.
    """
    # Imported here: it takes seconds, and the HTML report does not need it.
    from torch.utils.tensorboard import SummaryWriter

    from unified_rl.config import to_yaml

    folder = truth.run.path / "tensorboard"
    old = set(folder.glob("events.out.tfevents.*"))
    hook = threading.excepthook
    # What stops the writer's thread is raised here as well; other threads' errors are their own.
    threading.excepthook = lambda raised: None if issubclass(raised.exc_type, OSError) else hook(raised)
    try:
        with SummaryWriter(str(folder), purge_step=0) as writer:
            write_scalars(writer, truth)
            write_pictures(writer, truth)
            writer.add_text("config", f"```yaml\n{to_yaml(truth.config)}```", 0)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None
    finally:
        threading.excepthook = hook
    for stale in old:
        stale.unlink(missing_ok=True)
    return folder
