"""Trained weights on disk: only what was trained, under the checkpoint's own names, or a peft adapter folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from unified_rl.backbones.base import BackboneError, tensor_problems
from unified_rl.files import atomic_write_bytes, fsync

WEIGHTS = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER = "default"  # peft's name of the adapter without a role
ROLES = ("proposer", "solver", "generator")
PEFT_PREFIX = "base_model.model."
LORA_SEED = 0  # every rank and every resume must start from the same adapter


def inject_lora(model: nn.Module, targets: str, rank: int, alpha: int, adapter: str = ADAPTER) -> None:
    """Add LoRA (fp32, output unchanged) to the modules whose whole name matches the regular expression `targets`.

    Which adapters act is for the caller to say, see `activate`.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0)
    requires_grad = {_public(name): p.requires_grad for name, p in model.named_parameters()}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are meant
        torch.manual_seed(LORA_SEED)
        inject_adapter_in_model(config, model, adapter_name=adapter)
    for name, parameter in model.named_parameters():
        if is_adapter(name, adapter):
            parameter.data = parameter.data.float()  # peft takes the dtype of the base weight
        # peft switches the gradients of all parameters; which ones are trained is for the caller to say.
        parameter.requires_grad_(requires_grad.get(_public(name), False))
    model.eval()


def _public(name: str) -> str:
    """A parameter's name before peft moved the weight that it adapts."""
    return name.replace(".base_layer.", ".")


def activate(model: nn.Module, adapter: str | None) -> None:
    """Let exactly this adapter act, None for none; a name that no module has is none as well."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            # peft's own `set_adapter` also switches gradients, which is not ours to do in the middle of a forward.
            module._active_adapter = [] if adapter is None else [adapter]


def is_adapter(name: str, adapter: str) -> bool:
    """Whether the parameter `name` is one of this adapter's."""
    return "lora_" in name and f".{adapter}." in name


def peft_name(name: str, adapter: str) -> str:
    """Name of an adapter's parameter in peft's own files, which do not know what the adapter is called."""
    return PEFT_PREFIX + name.replace(f".{adapter}.weight", ".weight")


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write a policy of whole tensors; returns the file. The same tensors give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(folder / WEIGHTS, _serialised(tensors))
    return folder / WEIGHTS


def write_adapter(
    folder: Path, tensors: Mapping[str, torch.Tensor], targets: str, rank: int, alpha: int, base: str
) -> Path:
    """Write a LoRA policy as a folder that peft loads as well; returns the file with the weights.

    Args:
        tensors: by `peft_name`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets, base_model_name_or_path=base, inference_mode=True
    )
    config.save_pretrained(folder)
    fsync(folder / ADAPTER_CONFIG)  # peft leaves it in the cache
    atomic_write_bytes(folder / ADAPTER_WEIGHTS, _serialised(tensors))
    return folder / ADAPTER_WEIGHTS


def _serialised(tensors: Mapping[str, torch.Tensor]) -> bytes:
    return save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata={"format": "pt"})


def adapter_settings(folder: Path, targets: str) -> tuple[int, int] | None:
    """(rank, alpha) of the adapter in `folder`, None when it holds whole tensors.

    Raises:
        BackboneError: no policy there, or an adapter for other modules than `targets`.
    """
    if not (folder / ADAPTER_CONFIG).exists():
        if not (folder / WEIGHTS).exists():
            raise BackboneError(f"{folder} holds no policy: neither {WEIGHTS} nor {ADAPTER_CONFIG}")
        return None
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        settings = config["r"], config["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackboneError(f"{folder / ADAPTER_CONFIG}: not an adapter's configuration: {error!r}") from error
    if config.get("target_modules") != targets:
        raise BackboneError(
            f"{folder / ADAPTER_CONFIG}: adapts {config.get('target_modules')!r}, this backbone adapts {targets!r}"
            " there; adapters that read and adapters that draw may belong to different modules"
        )
    return settings


def read_tensors(file: Path, expected: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Tensors of `file`, which must have exactly the names and shapes `expected`.

    Raises:
        BackboneError: naming the file and the tensors that are missing, unknown or of another shape.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"{file} cannot be read: {error}") from None
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    problems = tensor_problems(expected, shapes, "not part of the policy")
    if problems:
        raise BackboneError(f"{file} does not fit the model: {'; '.join(problems)}")
    return tensors
