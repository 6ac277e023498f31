"""The part of a backbone that training runs, as one module for the engine; and the hash of all that stays frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from unified_rl.backbones.base import ReplaySettings, Trajectory
from unified_rl.backbones.load import Backbone
from unified_rl.train.zero3 import gathered


class DrawingPath(nn.Module):
    """The modules that draw, without image tokenizer, vision tower and text head.

    They are the backbone's own module objects, so that `backbone.image_dist` runs through the engine's hooks.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.image_dist, self.cell_losses = backbone.image_dist, backbone.cell_losses
        for name, module in drawing_modules(backbone.model, backbone.frozen_modules()):
            self.add_module(name.replace(".", "__"), module)

    def forward(self, work: str, *arguments: Any) -> Any:
        """`decisions(*arguments)` or `cell_losses(*arguments)`: one door, as the engine's hooks guard `forward`."""
        return self.decisions(*arguments) if work == "decisions" else self.cell_losses(*arguments)

    def decisions(
        self,
        prompts: Sequence[str],
        trajectory: Trajectory,
        sampling: ReplaySettings,
        steps: Sequence[int] | None,
        plans: Sequence[str] | None,
        reference: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probs, divergence from the base model (0 without `reference`), entropies: fp32 [B, S].

        Entropies carry no gradient.

        Args:
            steps: only these of the trajectory's decisions; default all.
            reference: the base model's `reference` of these decisions.
        """
        distribution = self.image_dist(prompts, trajectory, sampling, steps, plans)
        taken = trajectory.taken if steps is None else trajectory.taken[:, list(steps)]
        log_probs = distribution.log_prob(taken)
        kl = torch.zeros_like(log_probs) if reference is None else distribution.kl_to(log_probs, reference)
        with torch.no_grad():
            entropy = distribution.entropy()
        return log_probs, kl, entropy


def drawing_modules(module: nn.Module, frozen: Sequence[nn.Module], name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Largest sub-modules that hold none of `frozen`, with their names."""
    if any(module is f for f in frozen):
        return
    inside = {id(m) for m in module.modules()}
    if not any(id(f) in inside for f in frozen):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from drawing_modules(child, frozen, f"{name}.{child_name}" if name else child_name)


def select_trainable(backbone: Backbone, scope: str, dtype: torch.dtype) -> list[str]:
    """Let exactly the parameters of `scope` require gradients; returns their names."""
    names = backbone.trainable_names(scope)
    chosen = set(names)
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_(name in chosen)
        if name in chosen and not hasattr(parameter, "ds_id"):
            # The engine holds one dtype; the optimizer keeps the fp32 values.
            parameter.data = parameter.data.to(dtype)
    return names


def frozen_sha256(model: nn.Module, trained: Sequence[str]) -> dict[str, str]:
    """`tensor_sha256` of every tensor that is not trained."""
    names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    return tensor_sha256(model, names - set(trained))


def tensor_sha256(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """First 16 digits of the SHA-256 over dtype, shape and bytes of tensors, by name.

    Works on partitioned weights too, one tensor at a time; all ranks must call it.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    digests = {}
    for name in sorted(names):
        with gathered([tensors[name]]):
            value = tensors[name].detach().cpu().contiguous()
            digest = hashlib.sha256(f"{value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.flatten().view(torch.uint8).numpy())
            digests[name.replace(".base_layer.", ".")] = digest.hexdigest()[:16]  # peft moves what it adapts
    return digests


def different(expected: dict[str, str], found: dict[str, str]) -> str:
    """Names of the tensors that differ, the first ones; empty when all are equal."""
    names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def whole_tensors(model: nn.Module, names: Sequence[str], keep: bool = True) -> dict[str, torch.Tensor]:
    """CPU copies of parameters by name, gathered one by one; all ranks must call it, those without `keep` get none."""
    parameters = dict(model.named_parameters())
    tensors = {}
    for name in names:
        with gathered([parameters[name]]):
            if keep:
                tensors[name] = parameters[name].detach().cpu().clone()
    return tensors
