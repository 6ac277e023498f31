"""Groups of images: which prompts an iteration draws, and the drawing itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from unified_rl.config import ConfigError
from unified_rl.records import PromptRecord, RolloutRecord
from unified_rl.runtime import sample_seed

if TYPE_CHECKING:
    from unified_rl.backbones.base import Sampling
    from unified_rl.backbones.janus import JanusBackbone


def iteration_prompts(prompts: list[PromptRecord], count: int, run_seed: int, iteration: int) -> list[PromptRecord]:
    """The `count` different prompts of an iteration.

    Every epoch is a new permutation of all prompts, cut into iterations; what is left of it after the last whole
    iteration is not used in that epoch. The result depends on nothing but the arguments, so resuming is exact.

    Raises:
        ConfigError: fewer than `count` prompts.
    """
    if count > len(prompts):
        raise ConfigError(
            f"data.prompts_per_iteration={count} but there are only {len(prompts)} prompts; lower it or pack more"
        )
    epoch, part = divmod(iteration, len(prompts) // count)
    order = sorted(prompts, key=lambda p: p.prompt_id)
    random.Random(sample_seed(run_seed, epoch, "prompt-order", 0)).shuffle(order)
    return order[part * count : (part + 1) * count]


def draw_groups(
    backbone: JanusBackbone,
    prompts: list[PromptRecord],
    seeds_of: Callable[[PromptRecord], list[int]],
    sampling: Sampling,
    groups_per_batch: int,
    policy_version: str,
) -> Iterator[list[RolloutRecord]]:
    """Batches of records: for each prompt one image per seed, in order.

    Args:
        seeds_of: the seeds of a prompt's samples; all prompts must have the same number.
        groups_per_batch: prompts sampled together; changes speed and memory, not the images.
    """
    for start in range(0, len(prompts), groups_per_batch):
        part = prompts[start : start + groups_per_batch]
        seeds = [seeds_of(p) for p in part]
        trajectory = backbone.rollout_images([p.text for p in part], [s for group in seeds for s in group], sampling)
        images = backbone.decode(trajectory.actions)
        rows = iter(range(len(images)))
        yield [
            RolloutRecord(
                prompt=prompt,
                sample=sample,
                seed=seed,
                policy_version=policy_version,
                sampling=sampling.to_dict(),
                image=images[row],
                tensors={
                    "actions": trajectory.actions[row].int().cpu(),
                    "log_probs": trajectory.log_probs[row].float().cpu(),
                },
            )
            for prompt, group in zip(part, seeds, strict=True)
            for sample, (seed, row) in enumerate(zip(group, rows, strict=False))
        ]
