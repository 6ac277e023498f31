"""Sizes of a BAGEL, read from its checkpoint folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unified_rl.backbones.base import BackboneError

VIT_LAYER = re.compile(r"vit_model\.vision_model\.encoder\.layers\.(\d+)\.layer_norm1\.weight")
VIT_TABLE = "vit_model.vision_model.embeddings.position_embedding.weight"
LATENT_TABLE = "latent_pos_embed.pos_embed"


@dataclass(frozen=True)
class LanguageConfig:
    """The language model; the defaults are those of BAGEL-7B-MoT.

    Attributes:
        heads, kv_heads: of the queries, and of the keys and values that several queries share.
        rope_theta: base of the rotary frequencies.
        norm_eps: of every RMS norm.
    """

    hidden: int = 3584
    intermediate: int = 18944
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    vocabulary: int = 152064
    rope_theta: float = 1e6
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.hidden % self.heads or self.hidden // self.heads % 2:
            raise BackboneError(
                f"language model: hidden size {self.hidden} is not an even width for each of {self.heads} heads"
            )
        if self.heads % self.kv_heads:
            raise BackboneError(
                f"language model: {self.heads} heads do not share {self.kv_heads} key-value heads evenly"
            )
        if self.hidden % 4:
            raise BackboneError(f"language model: hidden size {self.hidden} must be a multiple of 4 for 2-D positions")

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower; the defaults are those of BAGEL-7B-MoT.

    Attributes:
        layers: that the checkpoint holds, which is one less than `vit_config.json` of the public checkpoint says.
        patch: pixels of a patch's side.
        side: patches of the largest image's side.
    """

    hidden: int = 1152
    intermediate: int = 4304
    layers: int = 26
    heads: int = 16
    patch: int = 14
    side: int = 70
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.hidden % self.heads:
            raise BackboneError(f"vision tower: hidden size {self.hidden} does not divide over {self.heads} heads")


@dataclass(frozen=True)
class BagelConfig:
    """A whole model.

    Attributes:
        latent_patch: latent cells of a token's side.
        latent_channels: of the VAE.
        latent_side: tokens of the largest image's side.
    """

    language: LanguageConfig = field(default_factory=LanguageConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    latent_patch: int = 2
    latent_channels: int = 16
    latent_side: int = 64

    @property
    def latent_width(self) -> int:
        """Numbers in a latent token."""
        return self.latent_patch**2 * self.latent_channels

    @classmethod
    def from_folder(cls, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> BagelConfig:
        """Sizes from `llm_config.json` and `vit_config.json`, and from `config.json` where there is one.

        The public files disagree with the weights about the vision tower's layers and the length of the position
        tables, and the public code overrules what they say of norms of queries and keys, tied embeddings and the
        tower's rotary positions. In all of this the weights decide: their names and shapes have to fit.

        Args:
            shapes: of the checkpoint's tensors by name.

        Raises:
            BackboneError: a file is missing, unreadable or describes another architecture.
        """
        language, vision = JsonFile.read(folder / "llm_config.json"), JsonFile.read(folder / "vit_config.json")
        file = folder / "config.json"
        whole = JsonFile.read(file) if file.is_file() else JsonFile(file, {})
        language.expect("hidden_act", "silu")
        language.expect("rope_scaling", None)
        vision.expect("hidden_act", "gelu_pytorch_tanh")
        whole.expect("connector_act", "gelu_pytorch_tanh")
        whole.expect("interpolate_pos", False)
        patch = whole.integer("latent_patch_size", 2)
        return cls(
            LanguageConfig(
                hidden=language.integer("hidden_size"),
                intermediate=language.integer("intermediate_size"),
                layers=language.integer("num_hidden_layers"),
                heads=language.integer("num_attention_heads"),
                kv_heads=language.integer("num_key_value_heads"),
                vocabulary=language.integer("vocab_size"),
                rope_theta=language.number("rope_theta", 1e6),
                norm_eps=language.number("rms_norm_eps", 1e-6),
            ),
            VisionConfig(
                hidden=vision.integer("hidden_size"),
                intermediate=vision.integer("intermediate_size"),
                layers=_vision_layers(vision, shapes),
                heads=vision.integer("num_attention_heads"),
                patch=vision.integer("patch_size"),
                side=table_side(shapes, VIT_TABLE, whole.integer("vit_max_num_patch_per_side", 70)),
                norm_eps=vision.number("layer_norm_eps", 1e-6),
            ),
            latent_patch=patch,
            latent_channels=whole.nested("vae_config").integer("z_channels", 16),
            latent_side=table_side(shapes, LATENT_TABLE, whole.integer("max_latent_size", 64)),
        )


def table_side(shapes: Mapping[str, tuple[int, ...]], name: str, otherwise: int) -> int:
    """Side of the square grid that the position table `name` covers; `otherwise` when the file has no such table.

    Raises:
        BackboneError: the table's length is no square.
    """
    if name not in shapes:
        return otherwise
    side = math.isqrt(shapes[name][0])
    if side * side != shapes[name][0]:
        raise BackboneError(f"{name} has {shapes[name][0]} rows, which is no square grid: the file is damaged")
    return side


def _vision_layers(vision: JsonFile, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Layers in the file: all that the configuration lists, or all but the last, which BAGEL never uses."""
    listed = vision.integer("num_hidden_layers")
    held = 1 + max((int(found[1]) for found in map(VIT_LAYER.fullmatch, shapes) if found), default=-1)
    if held not in (listed, listed - 1):
        raise BackboneError(
            f"{vision.file}: num_hidden_layers is {listed}, but the weights hold {held} layers of the vision tower"
        )
    return held


@dataclass(frozen=True)
class JsonFile:
    """Values of a configuration file, with complaints in its name."""

    file: Path
    values: dict[str, Any]

    @classmethod
    def read(cls, file: Path) -> JsonFile:
        """Raises `BackboneError` when it is missing or is not a JSON object."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BackboneError(
                f"{file.parent} is not a BAGEL checkpoint folder: it has no {file.name}; download the whole repository"
            ) from None
        except (OSError, ValueError) as error:
            raise BackboneError(f"{file} cannot be read: {error}") from None
        if not isinstance(values, dict):
            raise BackboneError(f"{file} must hold a JSON object, not a {type(values).__name__}")
        return cls(file, values)

    def expect(self, name: str, value: object) -> None:
        """Complain when `name` is there and is not `value`, the only one that this code computes."""
        if self.values.get(name, value) != value:
            raise BackboneError(f"{self.file}: {name} is {self.values[name]!r}; only {value!r} is supported")

    def allow(self, *names: str) -> None:
        """Complain about all other entries."""
        unknown = sorted(self.values.keys() - set(names))
        if unknown:
            raise BackboneError(f"{self.file}: unknown {', '.join(unknown)}; known are {', '.join(names)}")

    def integer(self, name: str, otherwise: int | None = None) -> int:
        """A whole number above 0."""
        value = self.values.get(name, otherwise)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BackboneError(f"{self.file}: {name} must be a whole number above 0, not {value!r}")
        return value

    def number(self, name: str, otherwise: float) -> float:
        """A finite number above 0."""
        value = self.values.get(name, otherwise)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise BackboneError(f"{self.file}: {name} must be a number above 0, not {value!r}")
        return float(value)

    def nested(self, name: str) -> JsonFile:
        """The object under `name`, empty where there is none."""
        value = self.values.get(name)
        return JsonFile(self.file, value if isinstance(value, dict) else {})
