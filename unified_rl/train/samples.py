"""What an iteration trains on: rollouts joined with their rewards, in groups, with advantages."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from unified_rl.config import PolicyConfig
from unified_rl.ledger import Run
from unified_rl.policy.advantage import group_advantages
from unified_rl.records import RewardRecord, RolloutRecord
from unified_rl.runtime import sample_seed
from unified_rl.shards import Record, read_records
from unified_rl.train.batching import permuted
from unified_rl.train.zero3 import TrainError


@dataclass(frozen=True)
class Sample:
    """One image as training sees it; tensors on the CPU.

    Attributes:
        tensors: of the rollout record, see `stack_trajectories`.
        plan: that it was drawn from, None without one.
        reference: what the base model says of the decisions (`kl_to` of their distributions takes it); None where
            the update needs none.
        reward: what the judge gave; `used_reward` what the update uses (another image's in the shuffled control).
        weights: fp32 [N] alpha R of its cells for the reward-weighted update; None for one reward an image.
        advantage: of `used_reward` within its group; 0 where nothing is compared.
    """

    key: str
    prompt: str
    tensors: dict[str, torch.Tensor]
    plan: str | None
    reference: torch.Tensor | None
    reward: float
    used_reward: float
    weights: torch.Tensor | None = None
    advantage: float = 0.0

    @property
    def old_log_probs(self) -> torch.Tensor:
        """fp32 [S] of the decisions, under the policy that drew the image."""
        return self.tensors["log_probs"]


@dataclass
class IterationData:
    """Samples of all whole groups, positions of the groups that carry signal, and what was left out."""

    samples: list[Sample]
    groups: list[list[int]]
    sampling: dict
    failed_groups: int
    zero_std_groups: int

    @property
    def zero_std_share(self) -> float:
        """Share of the whole groups whose rewards do not spread."""
        return self.zero_std_groups / max(1, self.zero_std_groups + len(self.groups))

    @property
    def reward_mean(self) -> float | None:
        """Mean reward over the samples of all whole groups; None without any."""
        return statistics.fmean(s.reward for s in self.samples) if self.samples else None

    @property
    def counts(self) -> dict[str, int]:
        """For the manifest."""
        return {
            "groups_used": len(self.groups),
            "groups_zero_std": self.zero_std_groups,
            "groups_failed": self.failed_groups,
            "images": sum(len(group) for group in self.groups),
        }


def load_iteration(run: Run, iteration: int) -> IterationData:
    """Read the committed rollouts and rewards of an iteration.

    Raises:
        LedgerError, ShardError, RecordError: a stage is missing or damaged.
        TrainError: drawn or scored by another policy than the current one, or rollouts and rewards do not match.
    """
    rollouts = checked_records(run, iteration, "rollout", RolloutRecord)
    rewards = checked_records(run, iteration, "reward", RewardRecord)
    require_matching(iteration, rollouts, rewards)
    if not rollouts:  # no picture of the iteration gave a drawing task
        return IterationData([], [], {}, 0, 0)
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
        if any(reward.status == "failed" for reward in rewards.values()):
            raise TrainError(f"iteration {iteration}: every group has a failed score; see the reward manifest")
        return IterationData([], [], dict(settings.pop()), len(by_prompt), 0)
    samples = [join(rollouts[key], rewards[key], run.config.policy) for keys in whole for key in keys]
    seed = sample_seed(run.config.seed, iteration, "shuffled-control", 0)
    samples, live = with_update(samples, len(whole), run.config.policy, seed)
    size = run.config.rollout.group_size
    groups = [list(range(i * size, (i + 1) * size)) for i, alive in enumerate(live) if alive]
    return IterationData(samples, groups, dict(settings.pop()), len(by_prompt) - len(whole), len(whole) - len(groups))


def require_matching(iteration: int, rollouts: Mapping[str, Record], rewards: Mapping[str, Record]) -> None:
    """Raise TrainError unless the two stages have the same keys."""
    unmatched = sorted(rollouts.keys() ^ rewards.keys())
    if unmatched:
        raise TrainError(
            f"iteration {iteration}: {len(unmatched)} samples lack their rollout or reward, first {unmatched[0]}; "
            "delete the reward stage of this iteration and run it again"
        )


def checked_records(run: Run, iteration: int, stage: str, kind: type[Record]) -> dict[str, Record]:
    """Records of a stage by key.

    Raises:
        TrainError: one of them was made with another policy than the current one.
    """
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


def join(rollout: RolloutRecord, reward: RewardRecord, policy: PolicyConfig) -> Sample:
    """A scored rollout as a sample, without advantage.

    Raises:
        TrainError: the records lack what the update needs, naming the sample.
    """
    reference = None
    if policy.objective == "grpo":
        decisions = rollout.tensors.get("log_probs")
        if decisions is None:
            raise TrainError(f"sample {rollout.key} was drawn without decisions; GRPO needs rollout.flow.eta above 0")
        reference = reward.tensors.get("reference_log_probs", reward.tensors.get("reference_means"))
        found = 0 if reference is None else len(reference)
        if found != len(decisions):
            raise TrainError(f"sample {rollout.key}: {len(decisions)} actions but {found} reference log-probs")
    weights = None
    if policy.objective == "reward_weighted" and "reward_map" in reward.tensors:
        weights = reward.components["alpha"] * reward.tensors["reward_map"].flatten()
    return Sample(
        rollout.key,
        rollout.prompt.text,
        rollout.tensors,
        rollout.plan,
        reference,
        reward.reward,
        reward.reward,
        weights,
    )


def with_update(
    samples: list[Sample], groups: int, policy: PolicyConfig, shuffle_seed: int
) -> tuple[list[Sample], list[bool]]:
    """Fill in what the update uses of `groups` equal groups of neighbours; also which groups carry signal.

    `policy.control == "shuffled"` first gives every sample the reward and map of a random sample of the iteration.
    Samples with a map of their own are not compared with each other, so all their groups count.
    """
    if policy.control == "shuffled":
        sources = [samples[i] for i in permuted(len(samples), shuffle_seed)]
        samples = [
            replace(s, used_reward=source.used_reward, weights=source.weights)
            for s, source in zip(samples, sources, strict=True)
        ]
    if samples[0].weights is not None:
        return samples, [True] * groups
    rewards = torch.tensor([s.used_reward for s in samples], dtype=torch.float64).view(groups, -1)
    advantages, live = group_advantages(rewards, policy.std_eps, policy.min_std)
    filled = [replace(s, advantage=a) for s, a in zip(samples, advantages.flatten().tolist(), strict=True)]
    return filled, live.tolist()
