"""What of a backbone is trained: names, LoRA adapters, and policies on disk. The same for every family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from unified_rl.backbones import policy_files
from unified_rl.backbones.base import BackboneError


class TrainedWeights:
    """Base of the backbones.

    A subclass sets `lora_targets`, a regular expression for the whole names of the modules that adapters go on, and
    says by `trained_in_full` which parameters scope `full` trains.

    Attributes:
        model: in eval mode.
        path: the checkpoint's folder.
        lora: rank and alpha, None without adapters.
    """

    lora_targets: str

    def __init__(self, model: nn.Module, path: str) -> None:
        self.model = model
        self.path = path
        self.lora: tuple[int, int] | None = None

    @staticmethod
    def trained_in_full(name: str) -> bool:
        """Whether scope `full` trains the parameter of this name."""
        raise NotImplementedError

    def trainable_names(self, scope: str) -> list[str]:
        """Parameter names that training updates, in the model's order.

        `full`: those that `trained_in_full`. `lora`: the adapter.
        """
        if scope == "lora":
            if self.lora is None:
                raise BackboneError("scope lora needs add_lora or a loaded adapter first")
            return policy_files.lora_names(self.model)
        if scope != "full":
            raise BackboneError(f"unknown scope {scope!r}: full or lora")
        return [name for name, _ in self.model.named_parameters() if self.trained_in_full(name) and "lora_" not in name]

    def add_lora(self, rank: int, alpha: int) -> None:
        """Put fp32 LoRA adapters on the modules of `lora_targets`; outputs stay the same bit for bit."""
        policy_files.inject_lora(self.model, self.lora_targets, rank, alpha)
        self.lora = (rank, alpha)

    def save_policy(self, folder: Path, scope: str, tensors: Mapping[str, torch.Tensor] | None = None) -> Path:
        """Write the trained tensors only; returns the weights file.

        Args:
            tensors: values by parameter name, for weights that live elsewhere (a ZeRO-3 engine); default: the model's.
        """
        names = self.trainable_names(scope)
        if tensors is None:
            parameters = dict(self.model.named_parameters())
            tensors = {name: parameters[name] for name in names}
        wrong = sorted(set(names) ^ set(tensors))
        if wrong:
            raise BackboneError(f"the policy to save lacks or adds tensors: {', '.join(wrong[:5])}")
        if scope == "full":
            return policy_files.write_weights(folder, tensors)
        return policy_files.write_adapter(folder, tensors, self.lora_targets, *self.lora, base=self.path)

    def load_policy(self, folder: str | Path) -> None:
        """Replace the trained weights by those that `save_policy` wrote to `folder`.

        Raises:
            BackboneError: any tensor missing, unknown or of another shape, or weights partitioned by ZeRO-3.
        """
        folder = Path(folder)
        settings = policy_files.adapter_settings(folder, self.lora_targets)
        if settings is not None and self.lora is None:
            self.add_lora(*settings)
        if settings != self.lora:
            raise BackboneError(f"{folder}: LoRA (rank, alpha) {settings}, the loaded model has {self.lora}")
        names = self.trainable_names("full" if settings is None else "lora")
        stored = {name: name if settings is None else policy_files.peft_name(name) for name in names}
        parameters = dict(self.model.named_parameters())
        if any(hasattr(parameters[name], "ds_id") for name in names):
            raise BackboneError("load_policy needs whole weights; load the policy before they are partitioned")
        file = folder / (policy_files.WEIGHTS if settings is None else policy_files.ADAPTER_WEIGHTS)
        tensors = policy_files.read_tensors(file, {stored[name]: parameters[name].shape for name in names})
        with torch.no_grad():
            for name in names:
                parameters[name].copy_(tensors[stored[name]])
