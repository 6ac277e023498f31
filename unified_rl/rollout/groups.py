"""Groups of images: which prompts an iteration draws, and the drawing itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from unified_rl.config import ConfigError, RolloutConfig, RunConfig
from unified_rl.records import PromptRecord, RolloutRecord
from unified_rl.runtime import sample_seed

if TYPE_CHECKING:
    from unified_rl.backbones.base import ReplaySettings
    from unified_rl.backbones.load import Backbone


def iteration_prompts(prompts: list[PromptRecord], count: int, run_seed: int, iteration: int) -> list[PromptRecord]:
    """The `count` different prompts of an iteration, see `iteration_keys`."""
    by_id = {p.prompt_id: p for p in prompts}
    return [by_id[key] for key in iteration_keys(list(by_id), count, run_seed, iteration)]


def iteration_keys(keys: list[str], count: int, run_seed: int, iteration: int) -> list[str]:
    """The `count` different prompts or images of an iteration, by id.

    Every epoch is a new permutation of all of them, cut into iterations; what is left of it after the last whole
    iteration is not used in that epoch. The result depends on nothing but the arguments, so resuming is exact.

    Raises:
        ConfigError: fewer than `count`.
    """
    if count > len(keys):
        raise ConfigError(
            f"data.prompts_per_iteration={count} but there are only {len(keys)} prompts or images; "
            "lower it or pack more"
        )
    epoch, part = divmod(iteration, len(keys) // count)
    order = sorted(keys)
    random.Random(sample_seed(run_seed, epoch, "prompt-order", 0)).shuffle(order)
    return order[part * count : (part + 1) * count]


def rollout_sampling(kind: type[ReplaySettings], rollout: RolloutConfig) -> ReplaySettings:
    """The settings, of the backbone's kind, that images to learn from are drawn with."""
    from unified_rl.backbones.base import Sampling

    if kind is Sampling:
        return Sampling(rollout.temperature, rollout.guidance_scale)
    return kind(guidance_scale=rollout.guidance_scale, **asdict(rollout.flow))


def evaluation_sampling(kind: type[ReplaySettings], config: RunConfig) -> ReplaySettings:
    """The settings that images to be measured are drawn with: flows by the ODE."""
    from unified_rl.backbones.base import Sampling

    guidance = config.evaluate.guidance_scale
    if kind is Sampling:
        return Sampling(config.rollout.temperature, guidance)
    flow = config.rollout.flow
    ode = replace(flow, eta=0.0, sde_window=0, sde_before=0, steps=config.evaluate.flow_steps or flow.steps)
    return kind(guidance_scale=guidance, **asdict(ode))


def draw_groups(
    backbone: Backbone,
    prompts: list[PromptRecord],
    seeds_of: Callable[[PromptRecord], list[int]],
    sampling: ReplaySettings,
    groups_per_batch: int,
    policy_version: str,
    rollout: RolloutConfig,
) -> Iterator[list[RolloutRecord]]:
    """Batches of records: for each prompt one image per seed, in order.

    Args:
        seeds_of: the seeds of a prompt's samples; all prompts must have the same number.
        groups_per_batch: prompts sampled together; changes speed and memory, not the images.
        rollout: says whether a plan is written first, one a prompt, greedily.
    """
    for start in range(0, len(prompts), groups_per_batch):
        part = prompts[start : start + groups_per_batch]
        texts, seeds = [p.text for p in part], [seeds_of(p) for p in part]
        plans = None
        if rollout.think:
            written = backbone.write_plans(texts, [group[0] for group in seeds], rollout.plan_tokens, 0.0)
            plans = [plan for plan, group in zip(written, seeds, strict=True) for _ in group]
        trajectory = backbone.rollout_images(texts, [s for group in seeds for s in group], sampling, plans)
        images = backbone.decode(trajectory)
        rows = iter(range(len(images)))
        yield [
            RolloutRecord(
                prompt=prompt,
                sample=sample,
                seed=seed,
                policy_version=policy_version,
                sampling=sampling.to_dict(),
                image=images[row],
                tensors=trajectory.tensors(row),
                plan=plans[row] if plans else None,
            )
            for prompt, group in zip(part, seeds, strict=True)
            for sample, (seed, row) in enumerate(zip(group, rows, strict=False))
        ]
