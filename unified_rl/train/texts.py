"""What Proposer and Solver train on: the texts that they wrote about images, joined with what the votes made of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from unified_rl.config import PolicyConfig, RunConfig
from unified_rl.inquiries import InquiryRecord, InquiryReward
from unified_rl.ledger import Run
from unified_rl.policy.advantage import group_advantages
from unified_rl.reward.self_consistency_prompts import solver_question
from unified_rl.runtime import sample_seed
from unified_rl.train.batching import permuted
from unified_rl.train.samples import checked_records, require_matching

TEXT_ROLES = ("proposer", "solver")  # in the order of their training


@dataclass(frozen=True, eq=False)
class TextSample:
    """One text as training sees it; tensors on the CPU.

    Attributes:
        image: uint8 [H, W, 3] that it is about.
        question: the very words that it answers.
        ids: int64 [T] as sampled; old_log_probs: fp32 [T] under the distribution that was sampled.
        reward: what the votes gave; `used_reward` what the update uses (another text's in the shuffled control).
        advantage: of `used_reward` within its group; 0 where a running baseline takes that place.
    """

    key: str
    image: np.ndarray
    question: str
    ids: torch.Tensor
    old_log_probs: torch.Tensor
    reward: float
    used_reward: float
    advantage: float = 0.0


@dataclass
class TextData:
    """Texts of one role, positions of those of each image that carries signal, and what was left out, by reason."""

    samples: list[TextSample]
    groups: list[list[int]]
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def zero_std_share(self) -> float:
        """Share of the compared groups whose rewards do not spread."""
        flat = self.left_out.get("groups_zero_std", 0)
        return flat / max(1, flat + len(self.groups))

    @property
    def reward_mean(self) -> float | None:
        """Mean reward of all texts; None without any."""
        return statistics.fmean(s.reward for s in self.samples) if self.samples else None

    @property
    def counts(self) -> dict[str, int]:
        """For the manifest; a group is what was written about one image."""
        return {"groups_used": len(self.groups), **self.left_out, "texts": sum(map(len, self.groups))}


def load_texts(run: Run, iteration: int, role: str) -> TextData:
    """Read what the Proposer or the Solver wrote in an iteration.

    Raises:
        LedgerError, ShardError, RecordError: a stage is missing or damaged.
        TrainError: written or scored by another policy than the current one, or records that do not match.
    """
    inquiries = checked_records(run, iteration, "rollout", InquiryRecord)
    rewards = checked_records(run, iteration, "reward", InquiryReward)
    require_matching(iteration, inquiries, rewards)
    pairs = [(inquiries[key], rewards[key]) for key in sorted(inquiries)]
    seed = sample_seed(run.config.seed, iteration, f"shuffled-control-{role}", 0)
    if role == "proposer":
        return proposer_data(pairs, run.config.policy, seed)
    return solver_data(pairs, run.config, seed)


def proposer_data(
    pairs: Sequence[tuple[InquiryRecord, InquiryReward]], policy: PolicyConfig, shuffle_seed: int
) -> TextData:
    """All replies of the Proposer with a reward, also those that hold no question; a group is those on one image.

    A reply whose question could not be scored is no bad reply: it stays out of the comparison.
    """
    images = [[s for s in _replies(*pair) if s] if pair[1].status == "ok" else [] for pair in pairs]
    compared = [group for group in images if len(group) > 1]
    samples = shuffled([s for group in compared for s in group], policy, shuffle_seed)
    filled, groups = [], []
    for group in compared:
        mine = samples[len(filled) : len(filled) + len(group)]
        rewards = torch.tensor([[s.used_reward for s in mine]], dtype=torch.float64)
        advantages, live = group_advantages(rewards, policy.std_eps, policy.min_std)
        if live[0]:
            groups.append(list(range(len(filled), len(filled) + len(group))))
        filled += [replace(s, advantage=a) for s, a in zip(mine, advantages[0].tolist(), strict=True)]
    left_out = {"groups_zero_std": len(compared) - len(groups), "groups_failed": len(images) - len(compared)}
    return TextData(filled, groups, left_out)


def _replies(inquiry: InquiryRecord, reward: InquiryReward) -> Iterator[TextSample | None]:
    tensors = inquiry.tensors
    for k, (asked, scored) in enumerate(zip(inquiry.questions, reward.questions, strict=True)):
        value, length = scored["reward"], int(tensors["proposer_lengths"][k])
        ids, log_probs = (tensors[f"proposer_{name}"][k, :length] for name in ("ids", "log_probs"))
        if value is None or not length:
            yield None
        else:
            key = f"{inquiry.image_id}, question {k}"
            yield TextSample(key, inquiry.image, asked["task"], ids.long(), log_probs, value, value)


def solver_data(pairs: Sequence[tuple[InquiryRecord, InquiryReward]], config: RunConfig, shuffle_seed: int) -> TextData:
    """The answers with a reward to each image's chosen question; images without one are counted."""
    samples, groups, left_out = [], [], {"groups_skipped": 0, "groups_failed": 0}
    for inquiry, reward in pairs:
        answers = list(_answers(inquiry, reward, config.self_consistency.wording)) if reward.status == "ok" else []
        if answers:
            groups.append(list(range(len(samples), len(samples) + len(answers))))
            samples += answers
        else:
            left_out["groups_skipped" if reward.status == "ok" else "groups_failed"] += 1
    return TextData(shuffled(samples, config.policy, shuffle_seed), groups, left_out)


def _answers(inquiry: InquiryRecord, reward: InquiryReward, wording: str) -> Iterator[TextSample]:
    """Each answer under the framing that it was sampled from."""
    if reward.chosen < 0:
        return
    question, tensors = inquiry.questions[reward.chosen]["question"], inquiry.tensors
    for i, value in enumerate(reward.solver_rewards):
        length = int(tensors["answer_lengths"][reward.chosen, i])
        ids, log_probs = (tensors[f"answer_{name}"][reward.chosen, i, :length] for name in ("ids", "log_probs"))
        if value is not None and length:
            key, framed = f"{inquiry.image_id}, answer {i}", solver_question(question, i, wording)
            yield TextSample(key, inquiry.image, framed, ids.long(), log_probs, value, value)


def shuffled(samples: list[TextSample], policy: PolicyConfig, seed: int) -> list[TextSample]:
    """With `policy.control == "shuffled"` every text gets the reward of a random one of the iteration."""
    if policy.control != "shuffled":
        return samples
    sources = [samples[i].reward for i in permuted(len(samples), seed)]
    return [replace(s, used_reward=value) for s, value in zip(samples, sources, strict=True)]
