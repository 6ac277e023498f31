"""What an iteration trains on: rollouts joined with their rewards, in groups, with advantages."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

import torch

from unified_rl.backbones.base import Sampling
from unified_rl.config import PolicyConfig
from unified_rl.ledger import Run
from unified_rl.policy.advantage import group_advantages
from unified_rl.records import RewardRecord, RolloutRecord
from unified_rl.runtime import sample_seed
from unified_rl.shards import read_records
from unified_rl.train.batching import permuted
from unified_rl.train.zero3 import TrainError


@dataclass(frozen=True)
class Sample:
    """One image as training sees it; tensors [S] on the CPU.

    `reward` is what the judge gave, `used_reward` what the advantage is made of (another image's in the control).
    """

    key: str
    prompt: str
    actions: torch.Tensor
    old_log_probs: torch.Tensor
    reference_log_probs: torch.Tensor
    reward: float
    used_reward: float
    advantage: float = 0.0


@dataclass
class IterationData:
    """Samples of all whole groups, positions of the groups that carry signal, and what was left out."""

    samples: list[Sample]
    groups: list[list[int]]
    sampling: Sampling
    failed_groups: int
    zero_std_groups: int

    @property
    def zero_std_share(self) -> float:
        """Share of the whole groups whose rewards do not spread."""
        return self.zero_std_groups / max(1, self.zero_std_groups + len(self.groups))

    @property
    def reward_mean(self) -> float:
        """Mean reward over the samples of all whole groups."""
        return statistics.fmean(s.reward for s in self.samples)


def load_iteration(run: Run, iteration: int) -> IterationData:
    """Read the committed rollouts and rewards of an iteration.

    Raises:
        LedgerError, ShardError, RecordError: a stage is missing or damaged.
        TrainError: drawn or scored by another policy than the current one, or rollouts and rewards do not match.
    """
    rollouts = _checked_records(run, iteration, "rollout", RolloutRecord)
    rewards = _checked_records(run, iteration, "reward", RewardRecord)
    unmatched = sorted(rollouts.keys() ^ rewards.keys())
    if unmatched:
        raise TrainError(
            f"iteration {iteration}: {len(unmatched)} samples lack their rollout or reward, first {unmatched[0]}; "
            "delete the reward stage of this iteration and run it again"
        )
    settings = {tuple(sorted(r.sampling.items())) for r in rollouts.values()}
    if len(settings) != 1:
        raise TrainError(f"iteration {iteration}: rollouts have {len(settings)} different sampling settings, not one")
    by_prompt: dict[str, list[str]] = {}
    for key, rollout in rollouts.items():
        by_prompt.setdefault(rollout.prompt.prompt_id, []).append(key)
    for prompt_id, keys in by_prompt.items():
        if len(keys) != run.config.rollout.group_size:
            raise TrainError(
                f"iteration {iteration}: prompt {prompt_id} has {len(keys)} samples, "
                f"rollout.group_size={run.config.rollout.group_size}"
            )
    whole = [sorted(keys) for keys in by_prompt.values() if all(rewards[k].status == "ok" for k in keys)]
    if not whole:
        raise TrainError(f"iteration {iteration}: every group has a failed score; see the reward manifest")
    samples = [join(rollouts[key], rewards[key]) for keys in whole for key in keys]
    seed = sample_seed(run.config.seed, iteration, "shuffled-control", 0)
    samples, live = with_advantages(samples, len(whole), run.config.policy, seed)
    size = run.config.rollout.group_size
    groups = [list(range(i * size, (i + 1) * size)) for i, alive in enumerate(live) if alive]
    return IterationData(
        samples, groups, Sampling(**dict(settings.pop())), len(by_prompt) - len(whole), len(whole) - len(groups)
    )


def _checked_records(
    run: Run, iteration: int, stage: str, kind: type[RolloutRecord] | type[RewardRecord]
) -> dict[str, RolloutRecord] | dict[str, RewardRecord]:
    """Records by key, all of the current policy."""
    version = run.current_policy(iteration)[1]
    manifest = run.require_manifest(iteration, stage)
    folder = run.stage_folder(iteration, stage)
    records = {record.key: record for record in read_records(folder, manifest, kind)}
    other = [(key, r.policy_version) for key, r in records.items() if r.policy_version != version]
    if manifest.policy_version != version or other:
        name, found = other[0] if other else ("its manifest", manifest.policy_version)
        raise TrainError(
            f"{folder}: {name} was made with policy {found}, the current policy of iteration {iteration} is "
            f"{version}; delete the rollout and reward stages of this iteration and run them again"
        )
    return records


def join(rollout: RolloutRecord, reward: RewardRecord) -> Sample:
    """A scored rollout as a sample, without advantage."""
    actions, reference = rollout.tensors["actions"].long(), reward.tensors["reference_log_probs"]
    if reference.shape != actions.shape:
        raise TrainError(f"sample {rollout.key}: {len(actions)} actions but {len(reference)} reference log-probs")
    return Sample(
        rollout.key, rollout.prompt.text, actions, rollout.tensors["log_probs"], reference, reward.reward, reward.reward
    )


def with_advantages(
    samples: list[Sample], groups: int, policy: PolicyConfig, shuffle_seed: int
) -> tuple[list[Sample], list[bool]]:
    """Fill in the advantages of `groups` equal groups of neighbours; also which groups carry signal.

    `policy.control == "shuffled"` first gives every sample the reward of a random sample of the iteration.
    """
    used = [s.reward for s in samples]
    if policy.control == "shuffled":
        used = [used[i] for i in permuted(len(used), shuffle_seed)]
    rewards = torch.tensor(used, dtype=torch.float64).view(groups, -1)
    advantages, live = group_advantages(rewards, policy.std_eps, policy.min_std)
    filled = [
        replace(sample, used_reward=reward, advantage=advantage)
        for sample, reward, advantage in zip(samples, used, advantages.flatten().tolist(), strict=True)
    ]
    return filled, live.tolist()
