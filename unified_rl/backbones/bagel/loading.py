"""Weights from safetensors files into a model, strictly by name, one tensor in host memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from unified_rl.backbones.bagel.attention import checked_attention
from unified_rl.backbones.bagel.config import BagelConfig
from unified_rl.backbones.bagel.model import BagelModel
from unified_rl.backbones.base import SHOWN, BackboneError, tensor_problems
from unified_rl.backbones.partitioned import partitioned, place_partitioned

WEIGHTS = "ema.safetensors"
INDEX = WEIGHTS + ".index.json"
DERIVED = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")  # tables that files may leave out

Place = Callable[[str, nn.Parameter, Callable[[], torch.Tensor]], None]


class Weights:
    """Tensors of one or more safetensors files, read when asked for.

    Args:
        files: together they hold every tensor once.
        prefix: of the names in the files; other tensors are ignored.

    Attributes:
        shapes: by name without the prefix.

    Raises:
        BackboneError: a file cannot be read, or two files hold the same tensor.
    """

    def __init__(self, files: Sequence[Path], prefix: str = "") -> None:
        self.files, self.prefix = list(files), prefix
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.holders: dict[str, Path] = {}
        for file in files:
            with _opened(file) as opened:
                for stored in opened.keys():  # noqa: SIM118 - not a dict
                    if stored.startswith(prefix):
                        self._note(stored.removeprefix(prefix), file, opened.get_slice(stored).get_shape())

    def _note(self, name: str, file: Path, shape: Sequence[int]) -> None:
        if name in self.holders:
            raise BackboneError(
                f"{name} is both in {self.holders[name]} and in {file}: keep the shards of one download"
            )
        self.holders[name], self.shapes[name] = file, tuple(shape)

    @classmethod
    def from_folder(cls, folder: Path) -> Weights:
        """The weights of a checkpoint folder: `ema.safetensors`, or the shards that its index lists.

        Raises:
            BackboneError: neither is there, or a shard is missing.
        """
        if (folder / WEIGHTS).is_file():
            return cls([folder / WEIGHTS])
        if not (folder / INDEX).is_file():
            raise BackboneError(f"{folder} has neither {WEIGHTS} nor {INDEX}; download the whole checkpoint")
        try:
            listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = sorted({folder / name for name in listed.values()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BackboneError(f"{folder / INDEX} is not an index of safetensors shards; download it again") from None
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise BackboneError(f"{folder / INDEX} lists shards that are not there: {', '.join(absent[:SHOWN])}")
        weights = cls(files)
        wrong = sorted(name for name in listed if weights.holders.get(name) != folder / listed[name])
        if wrong:
            raise BackboneError(f"{folder / INDEX}: the shards do not hold what it lists: {', '.join(wrong[:SHOWN])}")
        return weights

    def read(self, name: str) -> torch.Tensor:
        """One tensor in host memory; the file's pages are shared by all processes of a machine."""
        with _opened(self.holders[name]) as opened:
            return opened.get_tensor(self.prefix + name)

    def describe(self) -> str:
        """Where the tensors are, for messages."""
        return str(self.files[0]) if len(self.files) == 1 else f"{self.files[0].parent} ({len(self.files)} shards)"


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"{file} cannot be read as safetensors: {error}; download it again") from None


def check_names(model: nn.Module, weights: Weights) -> None:
    """Compare names and shapes before anything is read.

    Raises:
        BackboneError: naming the file and tensors that are missing, unknown or of another shape.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    problems = tensor_problems(expected, weights.shapes, "not part of the model", optional=DERIVED)
    if problems:
        raise BackboneError(
            f"{weights.describe()} does not fit the model that its configuration describes: "
            f"{'; '.join(problems)}. Use weights and JSON files of one checkpoint."
        )


def copy_in(name: str, parameter: nn.Parameter, read: Callable[[], torch.Tensor]) -> None:
    """Default placing: every process reads the whole tensor into its own parameter."""
    parameter.data.copy_(read())


def fill(model: nn.Module, weights: Weights, place: Place = copy_in) -> None:
    """Put every tensor into the model's parameter of the same name.

    Args:
        model: its parameters have storage, or are partitioned and `place` knows how to fill them.
        place: called with name, parameter and a function that reads the tensor. A placing for partitioned parameters
            reads on one rank only, or on none that does not need it.

    Raises:
        BackboneError: see `check_names`, which partitioned models have to pass before they are partitioned.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights.shapes:
                place(name, parameter, lambda name=name: weights.read(name))


def load_model(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: str = "auto",
    ds_config: dict | None = None,
) -> BagelModel:
    """The network of a checkpoint folder, in eval mode, no parameter requiring a gradient.

    The model is laid out without storage, allocated on `device`, and filled a tensor at a time: host memory holds
    one tensor, not a checkpoint.

    Args:
        ds_config: a DeepSpeed ZeRO-3 configuration; every rank then holds its part of each tensor.

    Raises:
        BackboneError: the folder is incomplete or its parts do not fit together.
    """
    folder, device = Path(folder), torch.device(device)
    weights = Weights.from_folder(folder)
    config = BagelConfig.from_folder(folder, weights.shapes)
    return build(config, weights, dtype, device, checked_attention(attention, device, dtype), ds_config)


def build(
    config: BagelConfig,
    weights: Weights,
    dtype: torch.dtype,
    device: torch.device,
    attention: str = "sdpa",
    ds_config: dict | None = None,
) -> BagelModel:
    """A model of this configuration with these weights; see `load_model`."""
    with torch.device("meta"):
        model = BagelModel(config, attention).to(dtype)
    check_names(model, weights)
    if ds_config is None:
        model.to_empty(device=device)
        place = copy_in
    else:
        with partitioned(ds_config):
            model = BagelModel(config, attention)
        place = place_partitioned
    for name, table in (("latent_pos_embed", model.latent_pos_embed), ("vit_pos_embed", model.vit_pos_embed)):
        place(f"{name}.pos_embed", table.pos_embed, table.values)
    fill(model, weights, place)
    return model.eval().requires_grad_(False)
