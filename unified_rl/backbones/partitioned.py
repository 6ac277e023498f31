"""Weights that are cut over the ranks of ZeRO-3 while they are read.

The one thing that backbones have to know of DeepSpeed: a model that no rank can hold must be born in parts, and a
backbone may not import the train stage, where everything else about it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn


@contextmanager
def partitioned(ds_config: dict) -> Iterator[None]:
    """Modules made inside hold only their rank's part of each parameter; all ranks make the same."""
    import deepspeed

    # Without `dtype`: the configuration says it, and on CPUs that argument turns any type into bfloat16.
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        yield


def place_partitioned(name: str, parameter: nn.Parameter, read: Callable[[], torch.Tensor]) -> None:
    """Fill a partitioned parameter; all ranks call it, only the first reads."""
    import deepspeed

    with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if dist.get_rank() == 0:
            parameter.data.copy_(read())
