"""Everything that knows DeepSpeed: the process group, ZeRO-3 configurations, the engine, gathered weights.

`deepspeed` is imported inside the functions that need it: it costs seconds and reads DS_ACCELERATOR on import.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from unified_rl.config import ConfigError
from unified_rl.runtime import Ranks
from unified_rl.train.heartbeat import Heartbeat
from unified_rl.train.partitions import TrainError, cut_anew

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
# Set from the run's own configuration: one place for each tunable.
INJECTED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)
CLIENT_STATE = "client_state"
_heartbeat: Heartbeat | None = None


# ---- processes ----------------------------------------------------------------------------------------------------


def init_process_group(ranks: Ranks, device: str, timeout_s: float = 600.0) -> None:
    """Join the ranks: NCCL on GPUs, gloo on CPUs; once they are joined, do nothing.

    Args:
        timeout_s: seconds that the meeting, and later each operation of all ranks, may take.

    Raises:
        TrainError: several ranks and no address to meet at, or not all of them came.
    """
    global _heartbeat
    if dist.is_initialized():
        return
    if ranks.world_size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise TrainError("MASTER_ADDR and MASTER_PORT are not set: start several ranks with launch/train.sh")
    os.environ.update(RANK=str(ranks.rank), LOCAL_RANK=str(ranks.local_rank), WORLD_SIZE=str(ranks.world_size))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")  # 0: any free port, enough for a single rank
    on_gpu = device.startswith("cuda")
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 deprecates; nothing a user could do about it.
    warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated", category=FutureWarning)
    _import_muon_uncompiled()
    if not on_gpu:
        # A C++ extension for collectives in shared memory, compiled at the first start; gloo does without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    limit = timedelta(seconds=timeout_s)
    # DeepSpeed makes groups of its own, whose time-out is not that of the first one but torch's default.
    dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = limit
    try:
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False, timeout=limit)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise TrainError(
            f"rank {ranks.rank} did not meet all {ranks.world_size} ranks at {address} within {timeout_s:.0f} s "
            f"(train.timeout_s): {str(error).splitlines()[0]}. Were all started, and can each host reach the address?"
        ) from error
    if ranks.world_size > 1:
        _heartbeat = Heartbeat(ranks, timeout_s)


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without its `torch.compile` decorators.

    `deepspeed.initialize` imports it whatever the optimizer, and decorating loads all of torch's compiler: two seconds
    of every start for functions that are never called here.
    """
    original = torch.compile
    torch.compile = lambda function=None, **_: function if function is not None else (lambda f: f)
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        torch.compile = original


def leave_process_group() -> None:
    """Wait for all ranks and part."""
    dist.barrier()
    if _heartbeat:
        _heartbeat.stop()
    dist.destroy_process_group()


@contextmanager
def lost_ranks_named() -> Iterator[None]:
    """An operation that fails because ranks are lost ends with a `TrainError` that names them."""
    try:
        yield
    except RuntimeError as error:  # gloo has no error of its own
        lost = _heartbeat.lost() if _heartbeat else ""
        if not lost:
            raise
        raise TrainError(
            f"{lost}. Nothing that is committed is lost: when all hosts are back, the same command goes on "
            f"(train.timeout_s; {str(error).splitlines()[0][:200]})"
        ) from error


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()


def free_memory() -> None:
    """Give the memory of what is no longer used back to the device; engines are held by reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reduced_sum(values: torch.Tensor) -> torch.Tensor:
    """Elementwise sum over the ranks."""
    total = values.clone()
    dist.all_reduce(total)
    return total


def largest(value: float, tag: int, device: torch.device) -> tuple[float, int]:
    """The largest `value` of all ranks, NaN above all others, and the tag that came with it."""
    mine = torch.tensor([value, tag], dtype=torch.float64, device=device)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    top = max((row.tolist() for row in rows), key=lambda row: (math.isnan(row[0]), row[0]))
    return top[0], int(top[1])


def from_rank_zero(value: Any) -> Any:
    """A small picklable value of rank 0, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


# ---- configuration ------------------------------------------------------------------------------------------------


def ds_config_path(name: str) -> Path:
    """File of a DeepSpeed configuration given by name (`zero3_bf16`) or path."""
    path = Path(name) if name.endswith(".json") else DS_CONFIGS / f"{name}.json"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in DS_CONFIGS.glob("*.json")))
        raise ConfigError(f"train.ds_config={name}: {path} does not exist; give one of {names}, or a path to a .json")
    return path


def load_ds_config(
    name: str, dtype: str, micro_batch: int, accumulation: int, world_size: int, max_grad_norm: float
) -> dict:
    """A file of `ds_configs/` with the batch geometry and gradient clipping of the run.

    Raises:
        ConfigError: not ZeRO-3, another precision than `dtype`, or keys that the run's configuration sets.
    """
    path = ds_config_path(name)
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"train.ds_config={name}: {path} is not valid JSON: {error}") from None
    ours = [key for key in INJECTED if key in config]
    if ours:
        raise ConfigError(f"{path} sets {', '.join(ours)}: remove it, the run configuration (train.*) has these")
    if config.get("zero_optimization", {}).get("stage") != 3:
        raise ConfigError(f"{path}: zero_optimization.stage must be 3")
    precision = "bfloat16" if config.get("bf16", {}).get("enabled") else "float32"
    if precision != dtype or config.get("fp16", {}).get("enabled"):
        raise ConfigError(f"{path} computes in {precision}, backbone.dtype={dtype}: take another train.ds_config")
    return {
        **config,
        "train_batch_size": micro_batch * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,  # DeepSpeed clips at 1.0 when this is absent; 0 is off
    }


def make_optimizer(
    parameters: list[nn.Parameter], ds_config: dict, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW; DeepSpeed's own (compiled at first use) where the optimizer states live in host memory."""
    settings = {"lr": 0.0, "betas": betas, "weight_decay": weight_decay}
    offload = ds_config["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    if offload == "none":
        return torch.optim.AdamW(parameters, **settings)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(parameters, adamw_mode=True, **settings)


# ---- engine -------------------------------------------------------------------------------------------------------


class Zero3Engine:
    """A module under ZeRO-3 with AdamW; every method must be called by all ranks together."""

    def __init__(
        self, module: nn.Module, ds_config: dict, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.0
    ) -> None:
        import deepspeed

        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = make_optimizer(parameters, ds_config, betas, weight_decay)
        self.engine: DeepSpeedEngine = deepspeed.initialize(
            model=module, model_parameters=parameters, optimizer=optimizer, config=ds_config
        )[0]
        self.world_size = dist.get_world_size()
        micro, accumulation = self.engine.train_micro_batch_size_per_gpu(), self.engine.gradient_accumulation_steps()
        if micro * accumulation * self.world_size != self.engine.train_batch_size():
            raise TrainError(f"DeepSpeed set train_batch_size {self.engine.train_batch_size()}, the ranks make another")

    def __call__(self, *inputs: Any) -> Any:
        """Forward of the module."""
        return self.engine(*inputs)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add the gradient of `loss`, a term of a sum over all micro-batches and ranks; `last` of this step."""
        # The number of micro-batches varies from step to step, so the boundary is ours to say. DeepSpeed averages over
        # ranks; its division by the configured number of accumulation steps is switched off.
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """Update the weights; returns the gradient norm before clipping (not finite or negative: overflow)."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def save(self, folder: Path, state: dict) -> None:
        """Write trained parameters, optimizer and `state` of all ranks into `folder`."""
        self.engine.save_checkpoint(
            str(folder.parent), tag=folder.name, client_state={CLIENT_STATE: state}, save_latest=False,
            exclude_frozen_parameters=True,
        )  # fmt: skip

    def load(self, folder: Path, world_size: int) -> dict:
        """Restore what `save` wrote on `world_size` ranks; returns its `state`."""
        if world_size != self.world_size:
            return self._load_cut_anew(folder, world_size)
        # Not strict: frozen weights are not in the checkpoint, they come from the base checkpoint and have a hash.
        path, state = self.engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=False)
        if path is None:
            raise TrainError(f"{folder} cannot be loaded; delete it and its iteration's train stage, and train again")
        return state[CLIENT_STATE]

    def _load_cut_anew(self, folder: Path, world_size: int) -> dict:
        """DeepSpeed gives every rank the partition that it wrote; other ranks need partitions of their own."""
        names = [f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world_size)]
        files = [next(folder.glob(name), None) for name in names]
        first = next(folder.glob("*zero_pp_rank_0_mp_rank_00_model_states.pt"), None)
        if None in files or first is None:
            raise TrainError(f"{folder} lacks files; delete it and its iteration's train stage, and train again")
        # Mapped: a rank touches the whole of the files, but need not hold it.
        settings = {"map_location": "cpu", "mmap": True, "weights_only": False}
        written = [torch.load(file, **settings)["optimizer_state_dict"] for file in files]
        optimizer, rank = self.engine.optimizer, dist.get_rank()
        sizes = [[parameter.ds_numel for parameter in group] for group in optimizer.fp16_groups]
        optimizer.checkpoint_event_prologue()
        optimizer.load_state_dict({rank: cut_anew(written, sizes, rank, self.world_size)})
        optimizer.checkpoint_event_epilogue()
        return torch.load(first, map_location="cpu", weights_only=False)[CLIENT_STATE]

    def close(self) -> None:
        """Take the engine's hooks off, so that the module can be dropped; nothing may be called any more."""
        from deepspeed.utils import groups

        self.engine.destroy()
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's: DeepSpeed refuses to load another model while it is set


@contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Whole values of (possibly partitioned) parameters, read-only, on all ranks."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")]):
        yield
