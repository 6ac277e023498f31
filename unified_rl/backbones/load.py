"""The backbone of a run, loaded as its configuration says."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from unified_rl.backbones.bagel.backbone import BagelBackbone
from unified_rl.backbones.janus import JanusBackbone
from unified_rl.config import BackboneConfig, checkpoint_path

FAMILIES = {"janus": JanusBackbone, "bagel": BagelBackbone}
Backbone = JanusBackbone | BagelBackbone


def load_backbone(
    config: BackboneConfig,
    local_rank: int = 0,
    policy: Path | None = None,
    ds_config: dict | None = None,
    roles: bool = False,
) -> Backbone:
    """Base weights from `config.path`, then the trained weights of the folder `policy` where given.

    Args:
        local_rank: which GPU of this machine to use.
        ds_config: DeepSpeed configuration; the weights are then partitioned over the ranks as they are read.
        roles: the policy consists of roles, which act inside `role` only.
    """
    transformers_logging.disable_progress_bar()  # one bar per worker and start says nothing in a log
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{local_rank % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    backbone = FAMILIES[config.family].from_pretrained(
        checkpoint_path(config.path),
        dtype=getattr(torch, config.dtype),
        device=device,
        attn_implementation=config.attn_implementation,
        ds_config=ds_config,
    )
    if policy is not None:
        (backbone.load_roles if roles else backbone.load_policy)(policy)
    return backbone
