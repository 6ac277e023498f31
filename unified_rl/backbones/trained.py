"""What of a backbone is trained: names, LoRA adapters by role, and policies on disk. The same for every family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from unified_rl.backbones import policy_files
from unified_rl.backbones.base import BackboneError
from unified_rl.backbones.policy_files import ROLES


class TrainedWeights:
    """Base of the backbones.

    A subclass sets `lora_targets` and `reading_lora_targets`, regular expressions for the whole names of the modules
    that adapters go on which draw, or only read; and says by `trained_in_full` which parameters scope `full` trains.

    Attributes:
        model: in eval mode.
        path: the checkpoint's folder.
        adapters: rank and alpha by role, that of the adapter without a role under "".
        acting: the role whose adapter acts now, None for none; see `role`.
    """

    lora_targets: str
    reading_lora_targets: str

    def __init__(self, model: nn.Module, path: str) -> None:
        self.model = model
        self.path = path
        self.adapters: dict[str, tuple[int, int]] = {}
        self.acting: str | None = None

    @staticmethod
    def trained_in_full(name: str) -> bool:
        """Whether scope `full` trains the parameter of this name."""
        raise NotImplementedError

    def trainable_names(self, scope: str) -> list[str]:
        """Parameter names that training updates, in the model's order.

        `full`: those that `trained_in_full`. `lora`: all adapters.
        """
        names = [name for name, _ in self.model.named_parameters()]
        if scope == "lora":
            if not self.adapters:
                raise BackboneError("scope lora needs add_lora or a loaded adapter first")
            return [name for name in names if "lora_" in name]
        if scope != "full":
            raise BackboneError(f"unknown scope {scope!r}: full or lora")
        return [name for name in names if self.trained_in_full(name) and "lora_" not in name]

    # ---- adapters -------------------------------------------------------------------------------------------------

    def add_lora(self, rank: int, alpha: int, role: str = "") -> None:
        """Put fp32 LoRA adapters on the modules of a role; outputs stay the same bit for bit.

        A model's only adapter acts also outside of `role`; of several, none does.

        Args:
            role: one of ROLES, each at most once; "" is an adapter that belongs to none, on the modules that draw.
        """
        targets = self._targets(role)
        if role in self.adapters or "" in self.adapters or (self.adapters and not role):
            raise BackboneError("the model already carries a LoRA adapter; load the checkpoint again")
        policy_files.inject_lora(self.model, targets, rank, alpha, _adapter(role))
        self.adapters[role] = (rank, alpha)
        self._act(role if len(self.adapters) == 1 else None)

    @contextmanager
    def role(self, name: str | None) -> Iterator[None]:
        """Inside, exactly this role's adapter acts: none for None or a role without one, and "" for the nameless one.

        A backward pass that recomputes activations runs the model again, so it has to be inside as well.
        """
        if name is not None:
            self._targets(name)
        before = self.acting
        self._act(name)
        try:
            yield
        finally:
            self._act(before)

    def _act(self, name: str | None) -> None:
        self.acting = name
        policy_files.activate(self.model, None if name is None else _adapter(name))

    def _targets(self, role: str) -> str:
        if role not in ("", *ROLES):
            raise BackboneError(f"unknown role {role!r}: one of {', '.join(ROLES)}")
        return self.reading_lora_targets if role in ("proposer", "solver") else self.lora_targets

    def load_roles(self, folder: str | Path) -> None:
        """Load the adapter of every role that has a sub-folder in `folder`; outside of `role` none of them acts.

        Raises:
            BackboneError: no role is there, or see `load_policy`.
        """
        found = [role for role in ROLES if (Path(folder) / role).is_dir()]
        if not found:
            raise BackboneError(f"{folder} holds no role's policy: none of {', '.join(ROLES)}")
        for role in found:
            self.load_policy(Path(folder) / role, role)
        self._act(None)

    # ---- policies on disk -----------------------------------------------------------------------------------------

    def save_policy(self, folder: Path, scope: str, tensors: Mapping[str, torch.Tensor] | None = None) -> Path:
        """Write the trained tensors only, of one adapter at most; returns the weights file.

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
        role = self._only_role()
        stored = {policy_files.peft_name(name, _adapter(role)): tensor for name, tensor in tensors.items()}
        return policy_files.write_adapter(folder, stored, self._targets(role), *self.adapters[role], base=self.path)

    def _only_role(self) -> str:
        """The role of the only adapter, "" where there is none yet."""
        if len(self.adapters) > 1:
            raise BackboneError(f"the model carries adapters of {', '.join(self.adapters)}; name one of them")
        return next(iter(self.adapters), "")

    def load_policy(self, folder: str | Path, role: str | None = None) -> None:
        """Replace the trained weights by those that `save_policy` wrote to `folder`.

        Args:
            role: whose adapter it is; default: the model's only adapter, and one without a role where it has none.

        Raises:
            BackboneError: any tensor missing, unknown or of another shape, or weights partitioned by ZeRO-3.
        """
        folder, role = Path(folder), self._only_role() if role is None else role
        settings = policy_files.adapter_settings(folder, self._targets(role))
        if settings is not None and role not in self.adapters:
            self.add_lora(*settings, role)
        if settings != self.adapters.get(role):
            raise BackboneError(
                f"{folder}: LoRA (rank, alpha) {settings}, the loaded model has {self.adapters.get(role)}"
            )
        file, stored = folder / policy_files.WEIGHTS, {}
        if settings is None:
            stored = {name: name for name in self.trainable_names("full")}
        else:
            file, adapter = folder / policy_files.ADAPTER_WEIGHTS, _adapter(role)
            names = [name for name in self.trainable_names("lora") if policy_files.is_adapter(name, adapter)]
            stored = {name: policy_files.peft_name(name, adapter) for name in names}
        parameters = dict(self.model.named_parameters())
        if any(hasattr(parameters[name], "ds_id") for name in stored):
            raise BackboneError("load_policy needs whole weights; load the policy before they are partitioned")
        tensors = policy_files.read_tensors(file, {stored[name]: parameters[name].shape for name in stored})
        with torch.no_grad():
            for name in stored:
                parameters[name].copy_(tensors[stored[name]])


def _adapter(role: str) -> str:
    """What a role's adapter is called in the model."""
    return role or policy_files.ADAPTER
