"""The models that score: images in, reward records out, by the method of the run.

The frozen judge already holds the base weights, so it also computes what GRPO needs to know of the reference policy:
training holds one model only.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from unified_rl.backbones.base import stack_trajectories
from unified_rl.backbones.load import Backbone, load_backbone
from unified_rl.config import RunConfig
from unified_rl.ledger import Run
from unified_rl.records import RewardRecord, RolloutRecord
from unified_rl.reward.drawings import FidelityJudge
from unified_rl.reward.gvu import GvuScore, gvu_scores
from unified_rl.reward.inquiry import FAILURES
from unified_rl.reward.skips import Skipped
from unified_rl.reward.srum import SrumJudge, record_fields
from unified_rl.runtime import Ranks


@dataclass
class Verdict:
    """What a method says of one image; the fields are those of `RewardRecord`."""

    status: str
    reward: float | None
    components: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    tokens: list[str] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    regions: list[dict] = field(default_factory=list)


class Judges:
    """The frozen base weights, and for a live judge the current policy as well."""

    def __init__(self, run: Run, iteration: int, ranks: Ranks) -> None:
        self.config: RunConfig = run.config
        self.base: Backbone = load_backbone(run.config.backbone, ranks.local_rank)
        self.live: Backbone | None = None
        self.fidelity: FidelityJudge | None = None
        if run.config.reward.method == "self_consistency":
            self.fidelity = fidelity_judge(run, iteration, self.base)
        elif run.config.reward.judge == "live":
            policy, _ = run.current_policy(iteration)
            self.live = load_backbone(run.config.backbone, ranks.local_rank, policy) if policy else self.base
        self.srum: SrumJudge | None = None
        if run.config.reward.method == "srum":
            judge = self.live or self.base
            self.srum = SrumJudge(judge, run.config.reward.srum, judge.grid, judge.device)

    def score(self, rollouts: list[RolloutRecord]) -> list[RewardRecord]:
        """Reward records of rollouts that share their sampling settings."""
        if self.fidelity:
            verdicts = self._fidelity(rollouts)
        else:
            verdicts = self._srum(rollouts) if self.srum else self._gvu(rollouts)
        if self.config.policy.objective == "grpo":
            with self.base.role(None) if self.fidelity else nullcontext():  # its roles are no part of the reference
                add_reference(verdicts, reference_tensors(self.base, rollouts))
        return [
            RewardRecord(
                key=rollout.key,
                prompt_id=rollout.prompt.prompt_id,
                policy_version=rollout.policy_version,
                **vars(verdict),
            )
            for rollout, verdict in zip(rollouts, verdicts, strict=True)
        ]

    def _fidelity(self, rollouts: list[RolloutRecord]) -> list[Verdict]:
        images = [r.image for r in rollouts]
        scores = self.fidelity.score(images, [r.prompt for r in rollouts], [r.seed for r in rollouts])
        return [fidelity_verdict(*score) for score in scores]

    def _gvu(self, rollouts: list[RolloutRecord]) -> list[Verdict]:
        images, prompts = [r.image for r in rollouts], [r.prompt.text for r in rollouts]
        question = self.config.reward.question
        frozen = gvu_scores(self.base, images, prompts, question)
        live = gvu_scores(self.live, images, prompts, question) if self.live else [None] * len(rollouts)
        return [gvu_verdict(self.config.reward.domain, *scores) for scores in zip(frozen, live, strict=True)]

    def _srum(self, rollouts: list[RolloutRecord]) -> list[Verdict]:
        prompts = [r.prompt for r in rollouts]
        scores = self.srum.score(
            [r.image for r in rollouts],
            [p.text for p in prompts],
            [p.prompt_id for p in prompts],
            [r.seed for r in rollouts],
        )
        return [Verdict(**record_fields(score)) for score in scores]


def fidelity_judge(run: Run, iteration: int, backbone: Backbone) -> FidelityJudge:
    """The judge of drawing tasks on base weights; a live one answers as the current policy's Solver."""
    policy, _ = run.current_policy(iteration)
    live = run.config.reward.judge == "live"
    if live and policy:
        backbone.load_roles(policy)
    return FidelityJudge(backbone, run.config.self_consistency, "solver" if live else None)


def fidelity_verdict(reward: float | Skipped, components: dict[str, float]) -> Verdict:
    """The verdict of one image of a drawing task; broken numbers are a failure, an unread answer is not."""
    if not isinstance(reward, Skipped):
        return Verdict("ok", reward, components)
    status = "failed" if reward.reason.value in FAILURES else "skipped"
    return Verdict(status, None, reason=reward.text)


def gvu_verdict(domain: str, frozen: GvuScore, live: GvuScore | None) -> Verdict:
    """The verdict of one image; a score that is not finite is a failure with its reason, never a number."""
    score = live or frozen
    if not score.tokens:
        return Verdict("failed", None, reason="the prompt has no tokens to score")
    if not all(math.isfinite(s.mean_log_prob) for s in (frozen, score)):
        return Verdict("failed", None, reason="the judge gave a non-finite log-likelihood")
    components = {"likelihood": score.geometric_mean, "log_likelihood": score.mean_log_prob}
    if live is not None:
        components["frozen_likelihood"] = frozen.geometric_mean
    value = components["likelihood" if domain == "probability" else "log_likelihood"]
    tensors = {"token_log_probs": score.token_log_probs}
    return Verdict("ok", value, components, tokens=score.tokens, tensors=tensors)


@torch.inference_mode()
def reference_tensors(base: Backbone, rollouts: list[RolloutRecord]) -> list[dict[str, torch.Tensor]]:
    """For each image what GRPO's divergence needs: fp32 [S] log-probs of tokens, or [S, N, D] means of flow steps."""
    sampling = base.sampling_type.from_dict(rollouts[0].sampling)
    trajectory = stack_trajectories([r.tensors for r in rollouts]).to(base.device)
    plans = None if rollouts[0].plan is None else [r.plan for r in rollouts]
    distribution = base.image_dist([r.prompt.text for r in rollouts], trajectory, sampling, plans=plans)
    reference = distribution.reference(trajectory.taken).float().cpu()
    name = "reference_log_probs" if reference.ndim == 2 else "reference_means"
    return [{name: row.clone()} for row in reference]


def add_reference(verdicts: list[Verdict], reference: list[dict[str, torch.Tensor]]) -> None:
    """Complete good verdicts; one whose reference is not finite becomes a failure."""
    for verdict, tensors in zip(verdicts, reference, strict=True):
        if verdict.status != "ok":
            continue
        if all(bool(t.isfinite().all()) for t in tensors.values()):
            verdict.tensors |= tensors
        else:
            verdict.status, verdict.reward, verdict.components, verdict.tensors = "failed", None, {}, {}
            verdict.tokens, verdict.reason = [], "the reference policy gave a non-finite log-prob"
