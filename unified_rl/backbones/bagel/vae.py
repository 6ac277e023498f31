"""FLUX's autoencoder between pixels and latents: diffusers' module filled from the public `ae.safetensors`.

Always fp32 and never trained. All sizes are read from the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from unified_rl.backbones.bagel.loading import Weights
from unified_rl.backbones.base import SHOWN, BackboneError

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

WEIGHTS = "ae.safetensors"
# Latents are shifted and scaled to about unit variance. A small autoencoder with other numbers folds them into the
# last convolution of its encoder and the first of its decoder.
SCALE, SHIFT = 0.3611, 0.1159
NORM_GROUPS = 32
BATCH = 4  # images at a time; bounds the memory of the full-resolution feature maps

# From the checkpoint's names to diffusers'; the order of the decoder's blocks is turned round on top of this.
RENAMED = (
    (r"\.down\.(\d+)\.block\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.(\d+)\.", r".up_blocks.\1.resnets.\2."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


class FluxVae:
    """Encodes and decodes images.

    Attributes:
        factor: pixels of a latent cell's side.
        channels: of a latent.
    """

    def __init__(self, module: AutoencoderKL) -> None:
        self.module = module.eval().requires_grad_(False)
        self.factor: int = 2 ** (len(module.config.block_out_channels) - 1)
        self.channels: int = module.config.latent_channels

    @classmethod
    def from_folder(cls, folder: str | Path, device: str | torch.device = "cpu") -> FluxVae:
        """Load `ae.safetensors` of a checkpoint folder.

        Raises:
            BackboneError: the file is missing or holds anything but this autoencoder, or diffusers is not installed.
        """
        file = Path(folder) / WEIGHTS
        if not file.is_file():
            raise BackboneError(f"{folder} has no {WEIGHTS}: download the whole checkpoint")
        weights = Weights([file])
        with torch.device("meta"):
            module = module_of(weights)
        names = {diffusers_name(name, len(module.config.block_out_channels)): name for name in weights.shapes}
        _check(module, names, weights)
        module.to_empty(device=device)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                # The checkpoint's attention projects by convolutions of one pixel, diffusers' by linear layers.
                parameter.copy_(weights.read(names[name]).reshape(parameter.shape))
        return cls(module)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.module.device

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """fp32 [B, channels, H / factor, W / factor]: mean latents, scaled as the language model takes them.

        Args:
            images: [B, 3, H, W] in [0, 1].

        Raises:
            BackboneError: a side is no multiple of the factor.
        """
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise BackboneError(f"images of {height} x {width} pixels: sides must be multiples of {self.factor}")
        parts = (images.to(self.device).float() * 2 - 1).split(BATCH)
        return SCALE * (torch.cat([self.module.encode(part).latent_dist.mean for part in parts]) - SHIFT)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """fp32 [B, 3, H, W] images in [0, 1] of latents [B, channels, h, w]."""
        scaled = latents.to(self.device).float() / SCALE + SHIFT
        images = torch.cat([self.module.decode(part).sample for part in scaled.split(BATCH)])
        return (images / 2 + 0.5).clamp(0, 1)


def diffusers_name(name: str, levels: int) -> str:
    """diffusers' name of a tensor of `ae.safetensors`; unknown names stay as they are."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    # The checkpoint counts the decoder's blocks from the output, diffusers from the latent.
    return re.sub(r"\.up_blocks\.(\d+)\.", lambda found: f".up_blocks.{levels - 1 - int(found[1])}.", name)


def module_of(weights: Weights) -> AutoencoderKL:
    """diffusers' autoencoder of the sizes that the weights have; they are not read."""
    first = "encoder.down.{}.block.{}.conv1.weight"
    channels = []
    while first.format(len(channels), 0) in weights.shapes:
        channels.append(weights.shapes[first.format(len(channels), 0)][0])
    blocks = sum(
        re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", name) is not None for name in weights.shapes
    )
    latent = weights.shapes.get("decoder.conv_in.weight", (0, 0))[1]
    if not (channels and latent):
        raise BackboneError(f"{weights.describe()} is not FLUX's autoencoder: it lacks {first.format(0, 0)}")
    return empty_module(channels, blocks, latent)


def empty_module(channels: Sequence[int], blocks: int, latent: int) -> AutoencoderKL:
    """diffusers' autoencoder.

    Args:
        channels: of each level, at full resolution first.
        blocks: of each level of the encoder.
        latent: channels of the latents.
    """
    try:
        from diffusers import AutoencoderKL  # heavy, and not needed to train or to read
    except ImportError as error:
        raise BackboneError(f"BAGEL's images need diffusers ({error}): pip install diffusers") from None
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=tuple(channels),
        layers_per_block=blocks,
        latent_channels=latent,
        norm_num_groups=NORM_GROUPS,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _check(module: AutoencoderKL, names: Mapping[str, str], weights: Weights) -> None:
    """Every tensor has its parameter, and the other way round."""
    expected = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - names.keys())]
    problems += [f"{names[name]} is not part of the model" for name in sorted(names.keys() - expected.keys())]
    for name in sorted(expected.keys() & names.keys()):
        shape = weights.shapes[names[name]]
        if shape != expected[name] and shape != (*expected[name], 1, 1):
            problems.append(f"{names[name]} has shape {list(shape)}, the model {list(expected[name])}")
    if problems:
        raise BackboneError(
            f"{weights.describe()} is not FLUX's autoencoder: {'; '.join(problems[:SHOWN])}; download it again"
        )
