"""Which values and combinations of a configuration are possible."""

from __future__ import annotations

import math

from omegaconf import DictConfig, OmegaConf


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the remedy."""


MAX_REGIONS = 256  # of an image
TOKEN_FAMILIES = ("janus",)  # draw tokens; all others draw by a flow
CHOICES = {
    "backbone.family": ("janus", "bagel"),
    "backbone.dtype": ("float32", "bfloat16"),
    "backbone.device": ("auto", "cpu", "cuda"),
    "reward.method": ("gvu", "srum", "self_consistency"),
    "reward.srum.preset": ("srum", "srum_release"),
    "reward.srum.regions": ("grid", "components", "sam", "file"),
    "reward.srum.wording": ("full", "brief"),
    "reward.judge": ("frozen", "live"),
    "reward.domain": ("probability", "log"),
    "self_consistency.preset": ("self_consistency", "self_consistency_release", "evolmm"),
    "self_consistency.wording": ("full", "brief"),
    "self_consistency.image_term": ("embedding", "likelihood"),
    "rollout.flow.renorm": ("global", "channel", "none"),
    "policy.objective": ("grpo", "reward_weighted"),
    "policy.control": ("none", "shuffled", "constant"),
    "train.scope": ("lora", "full"),
    "train.old_log_probs": ("rollout", "recomputed"),
}
AT_LEAST = {
    "iterations": 1,
    "backbone.threads": 1,
    "data.prompts_per_iteration": 1,
    "data.keep_rollouts": 0,
    "rollout.group_size": 1,
    "rollout.flow.steps": 1,
    "rollout.plan_tokens": 1,
    "rollout.groups_per_batch": 1,
    "rollout.groups_per_shard": 1,
    "rollout.workers": 1,
    "reward.batch_size": 1,
    "reward.srum.grid_rows": 1,
    "reward.srum.grid_columns": 1,
    "reward.srum.max_new_tokens_global": 1,
    "reward.srum.max_new_tokens_local": 1,
    "reward.srum.retries": 0,
    "reward.workers": 1,
    "train.ranks": 1,
    "train.groups_per_step": 1,
    "train.epochs": 1,
    "train.micro_batch": 1,
    "train.keep_checkpoints": 1,
    "train.timeout_s": 1,
    "policy.steps_per_update": 0,
    "policy.reference_weight": 0,
    "rollout.flow.eta": 0,
    "self_consistency.understanding": 0,
    "self_consistency.generation": 0,
    "self_consistency.questions": 2,
    "self_consistency.answers": 1,
    "self_consistency.references": 1,
    "self_consistency.fidelity_samples": 1,
    "self_consistency.pairs": 1,
    "self_consistency.min_pairs": 1,
    "self_consistency.task_retries": 0,
    "self_consistency.proposer_tokens": 1,
    "self_consistency.task_tokens": 1,
    "self_consistency.solver_tokens": 1,
    "self_consistency.caption_tokens": 1,
    "self_consistency.solver_groups_per_step": 1,
    "self_consistency.kl_rate": 0,
    "evaluate.flow_steps": 0,
    "evaluate.samples_per_prompt": 1,
    "evaluate.batch_size": 1,
    "evaluate.bootstrap": 1,
}
ABOVE_ZERO = (
    "rollout.temperature",
    "rollout.flow.shift",
    "reward.srum.retry_temperature",
    "self_consistency.proposer_temperature",
    "self_consistency.solver_temperature",
    "self_consistency.proposer_learning_rate",
    "self_consistency.solver_learning_rate",
    "self_consistency.kl_target",
    "train.learning_rate",
    "policy.clip_low",
    "policy.clip_high",
    "policy.advantage_limit",
    "policy.flow_shift",
)
SHARES = (
    "reward.max_failed_share",
    "train.activation_checkpointing",
    "policy.hidden_prompts",
    "self_consistency.reference_share",
    "self_consistency.min_quality",
    "self_consistency.hard_share",
    "self_consistency.min_majority",
    "self_consistency.cycle_weight",
)


def check_config(config: DictConfig) -> None:
    """Raise ConfigError for a missing or impossible value, or values that do not fit together."""
    if config.reward.method == "self_consistency" and OmegaConf.is_missing(config.data, "prompts"):
        config.data.prompts = ""  # it reads images instead
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"no value for {', '.join(missing)}; set it in the recipe or as key=value")
    for key, allowed in CHOICES.items():
        value = OmegaConf.select(config, key)
        if value not in allowed:
            raise ConfigError(f"{key}={value} is not one of {', '.join(allowed)}")
    for key, least in AT_LEAST.items():
        value = OmegaConf.select(config, key)
        if not least <= value < math.inf:
            raise ConfigError(f"{key}={value} must be at least {least} and finite")
    for key in ABOVE_ZERO:
        value = OmegaConf.select(config, key)
        if not 0 < value < math.inf:
            raise ConfigError(f"{key}={value} must be above 0 and finite")
    for key in SHARES:
        if not 0 <= OmegaConf.select(config, key) <= 1:
            raise ConfigError(f"{key}={OmegaConf.select(config, key)} must lie in 0..1")
    limit = config.self_consistency.max_token_entropy
    if not limit > 0:
        raise ConfigError(f"self_consistency.max_token_entropy={limit} must be above 0; .inf for no limit")
    if not 0 < config.self_consistency.solver_top_p <= 1:
        raise ConfigError(f"self_consistency.solver_top_p={config.self_consistency.solver_top_p} must lie in 0..1")
    if config.policy.clip_low >= 1:
        raise ConfigError(f"policy.clip_low={config.policy.clip_low} must be below 1: the ratio is positive")
    _check_combinations(config)


def _check_combinations(config: DictConfig) -> None:
    """Settings that are possible one by one, but not together."""
    grpo, groups = config.policy.objective == "grpo", config.rollout.group_size
    if groups < 2 and (grpo or config.reward.method == "gvu"):
        raise ConfigError(f"rollout.group_size={groups} must be at least 2: rewards are compared within a group")
    if grpo and config.policy.control == "constant":
        raise ConfigError("policy.control=constant is a control of policy.objective=reward_weighted")
    if config.reward.method == "self_consistency":
        _check_self_consistency(config)
    elif config.data.images:
        raise ConfigError(f"data.images={config.data.images}: reward.method={config.reward.method} draws data.prompts")
    srum = config.reward.srum
    for key, source in (("boxes_file", "file"), ("sam_path", "sam")):
        if bool(srum[key]) != (srum.regions == source):
            raise ConfigError(
                f"reward.srum.{key}={srum[key]!r} and reward.srum.regions={srum.regions} do not fit: "
                f"{source} needs it, the others must not have it"
            )
    if srum.regions == "grid" and srum.grid_rows * srum.grid_columns > MAX_REGIONS:
        raise ConfigError(f"reward.srum: a grid of {srum.grid_rows} x {srum.grid_columns} has over {MAX_REGIONS} cells")
    if config.backbone.family in TOKEN_FAMILIES:
        if config.rollout.think:
            raise ConfigError(f"rollout.think=true: {config.backbone.family} cannot draw from a written plan")
        return
    if config.rollout.temperature != 1:
        raise ConfigError(f"rollout.temperature={config.rollout.temperature}: {config.backbone.family} has none, set 1")
    if grpo and not config.rollout.flow.eta > 0:
        raise ConfigError(
            "rollout.flow.eta=0 draws by the ODE, which policy.objective=grpo cannot train; set it above 0"
        )


def _check_self_consistency(config: DictConfig) -> None:
    """Settings of Ask-Solve-Generate."""
    ours = config.self_consistency
    source = "prompts" if ours.imageless else "images"
    if not config.data[source]:
        raise ConfigError(
            f"no value for data.{source}; reward.method=self_consistency asks about images, with "
            f"self_consistency.imageless={str(ours.imageless).lower()} those of data.{source}"
        )
    if not ours.understanding + ours.generation:
        raise ConfigError("self_consistency.understanding=0 and self_consistency.generation=0: nothing is left to do")
    if ours.min_pairs > ours.pairs:
        raise ConfigError(f"self_consistency.min_pairs={ours.min_pairs} is more than the {ours.pairs} pairs asked for")
    if ours.answers < 2:
        raise ConfigError("self_consistency.answers=1: a vote needs at least 2 answers")
    if config.train.scope != "lora":
        raise ConfigError(f"train.scope={config.train.scope}: the three roles are adapters; set train.scope=lora")
