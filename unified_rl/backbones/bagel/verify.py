"""Compare this BAGEL with numbers of the public code.

    python -m unified_rl.backbones.bagel.verify FILE.safetensors

The file holds weights (`weights.*`), inputs and outputs. Each block is appended to the context of the earlier ones: a
picture, a text, a clean latent and a second text, whose logits are compared; then a noisy latent at time 0.7, whose
velocity is compared. Prints both largest absolute differences as JSON. Exit code 0 below 1e-5, 1 from there on, 2 for
a file that cannot be used.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from unified_rl.backbones.bagel.config import VIT_LAYER, BagelConfig, LanguageConfig, VisionConfig
from unified_rl.backbones.bagel.context import Context
from unified_rl.backbones.bagel.loading import Weights, build
from unified_rl.backbones.bagel.model import BagelModel
from unified_rl.backbones.bagel.sequence import Latent, Picture, Segment, SpecialTokens, Text, pack, patchify
from unified_rl.backbones.base import BackboneError
from unified_rl.runtime import command_parser

TOLERANCE = 1e-5
SPECIAL = SpecialTokens(text_start=1, text_end=2, image_start=3, image_end=4)
NOISY_TIME = 0.7
EMBEDDINGS = "language_model.model.embed_tokens.weight"
GATE = "language_model.model.layers.0.mlp.gate_proj.weight"
PATCHES = "vit_model.vision_model.embeddings.patch_embedding.weight"
VIT_MLP = "vit_model.vision_model.encoder.layers.0.mlp.fc1.weight"
LATENTS = "vae2llm.weight"


@dataclass(frozen=True)
class Golden:
    """A file to compare with; see the module."""

    weights: Weights
    inputs: Weights
    outputs: Weights

    @classmethod
    def open(cls, file: Path) -> Golden:
        """Raises `BackboneError` when the file is unreadable or lacks inputs or outputs."""
        golden = cls(*(Weights([file], f"{part}.") for part in ("weights", "inputs", "outputs")))
        for part, names in (
            ("inputs", ("vit_pixels", "text_1", "clean_latent", "text_2", "noise_tokens")),
            ("outputs", ("text_2_logits", "velocity")),
        ):
            absent = [name for name in names if name not in getattr(golden, part).shapes]
            if absent:
                raise BackboneError(f"{file} lacks {part}: {', '.join(f'{part}.{name}' for name in absent)}")
        return golden


def sizes_of(weights: Weights, arguments: argparse.Namespace) -> BagelConfig:
    """Configuration from the shapes of the weights and the numbers that shapes do not show."""
    shapes = weights.shapes
    absent = [name for name in (EMBEDDINGS, GATE, PATCHES, VIT_MLP, LATENTS) if name not in shapes]
    if absent:
        raise BackboneError(f"{weights.describe()} lacks weights: {', '.join('weights.' + name for name in absent)}")
    layers = {name.split(".")[3] for name in shapes if name.startswith("language_model.model.layers.")}
    vision_layers = sum(VIT_LAYER.fullmatch(name) is not None for name in shapes)
    vocabulary, hidden = shapes[EMBEDDINGS]
    vit_hidden, pixels = shapes[PATCHES]
    if pixels != 3 * arguments.vit_patch**2:
        raise BackboneError(f"{PATCHES} has {pixels} inputs, which is no patch of {arguments.vit_patch}: --vit-patch")
    return BagelConfig(
        LanguageConfig(
            hidden, shapes[GATE][0], len(layers), arguments.heads, arguments.kv_heads, vocabulary, rope_theta=1e6
        ),
        VisionConfig(
            vit_hidden, shapes[VIT_MLP][0], vision_layers, arguments.vit_heads, arguments.vit_patch, arguments.vit_side
        ),
        latent_patch=arguments.latent_patch,
        latent_channels=shapes[LATENTS][1] // arguments.latent_patch**2,
        latent_side=arguments.max_latent,
    )


def append(model: BagelModel, segment: Segment, context: Context) -> tuple[torch.Tensor, Context]:
    """Understanding states [Tu, hidden] of one more segment, and the context behind it."""
    hidden, context = model(pack([[segment]], model.config, SPECIAL, context.next_position), context)
    return hidden.understanding, context


@torch.no_grad()
def outputs_of(model: BagelModel, inputs: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the second text [n + 2, vocabulary] and velocity of the noisy latent [N, latent width]."""
    patch = model.config.latent_patch
    latent = inputs.read("clean_latent")
    rows, columns = latent.shape[1] // patch, latent.shape[2] // patch
    first, second = (Text(SPECIAL.wrap(inputs.read(name).tolist())) for name in ("text_1", "text_2"))
    context = Context.empty(1)
    for segment in (Picture(inputs.read("vit_pixels")), first, Latent(patchify(latent, patch), rows, columns)):
        _, context = append(model, segment, context)
    states, context = append(model, second, context)
    noisy = Latent(inputs.read("noise_tokens"), rows, columns, NOISY_TIME, noisy=True)
    return model.logits(states), model.velocity(pack([[noisy]], model.config, SPECIAL, context.next_position), context)


def difference(found: torch.Tensor, expected: torch.Tensor, name: str) -> float:
    """Largest absolute difference; infinite when a number is not finite."""
    if found.shape != expected.shape:
        raise BackboneError(f"outputs.{name} has shape {list(expected.shape)}, the model gives {list(found.shape)}")
    largest = (found - expected).abs().max().item()
    return largest if math.isfinite(largest) else math.inf


def compare(file: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Largest differences of text logits and velocity."""
    golden = Golden.open(file)
    model = build(sizes_of(golden.weights, arguments), golden.weights, torch.float32, torch.device("cpu"))
    logits, velocity = outputs_of(model, golden.inputs)
    return {
        "text_logits": difference(logits, golden.outputs.read("text_2_logits"), "text_2_logits"),
        "velocity": difference(velocity, golden.outputs.read("velocity"), "velocity"),
    }


def parser() -> argparse.ArgumentParser:
    """The command line; defaults fit the file in this package's tests."""
    made = command_parser("unified_rl.backbones.bagel.verify", __doc__)
    made.add_argument("file", type=Path)
    for flag, default, meaning in (
        ("--heads", 4, "attention heads of the language model"),
        ("--kv-heads", 2, "its key-value heads"),
        ("--vit-heads", 4, "attention heads of the vision tower"),
        ("--vit-patch", 14, "pixels of a patch's side"),
        ("--vit-side", 10, "patches of the largest picture's side"),
        ("--latent-patch", 2, "latent cells of a token's side"),
        ("--max-latent", 8, "latent tokens of the largest image's side"),
    ):
        made.add_argument(flag, type=_above_zero, default=default, help=f"{meaning} (default {default})")
    return made


def _above_zero(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code; see the module."""
    parsed = parser().parse_args(arguments)
    try:
        differences = compare(parsed.file, parsed)
    except BackboneError as error:
        print(error, file=sys.stderr)
        return 2
    # JSON has no infinity: null stands for a difference that is not a number.
    print(json.dumps({name: value if math.isfinite(value) else None for name, value in differences.items()}))
    return 0 if max(differences.values()) < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
