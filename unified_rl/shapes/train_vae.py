"""Training of the tiny BAGEL's autoencoder: pictures to 4 x 4 latent cells of 16 numbers and back.

What a latent cell holds is not learnt but given: the principal components of its own 8 x 8 pixels. An encoder left to
choose writes each cell in a way that depends on the whole picture, and no model of this size learns to draw in that.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from unified_rl.backbones.bagel.vae import SCALE, SHIFT, WEIGHTS, FluxVae, empty_module
from unified_rl.shapes.train_vq import patch_codes, random_pictures, seen, to_pixels, to_uint8, true_codes
from unified_rl.shapes.world import GRID

STEPS = 1000
BATCH = 16
LEARNING_RATE = 2.0e-3
CHANNELS = 16
CELLS_A_SIDE = 2 * GRID  # latent cells
WIDTHS = (32, 32, 64, 64)  # of the levels; three halvings: 8 pixels a latent cell
NOISE = 0.35  # largest noise on the latents that the decoder is trained with
LOG_VARIANCE = -12.0  # of the encoder's distribution, which is a point for all purposes
# Components are divided by this power of their spread: at 0 similar shapes are almost one point, at 1 the faintest
# detail is as loud as the colour.
WHITENING = 0.5

# From diffusers' names to the checkpoint's; the order of the decoder's blocks is turned round on top of this.
RENAMED = (
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)


@lru_cache(maxsize=1)
def patch_vectors() -> torch.Tensor:
    """fp32 [codes, CHANNELS]: the latent of every distinct patch, mean 0 and mean square 1 over all of them."""
    pixels = np.array([list(patch) for patch in patch_codes()], dtype=np.float64)
    left, spread, _ = np.linalg.svd(pixels - pixels.mean(0), full_matrices=False)
    vectors = left[:, :CHANNELS] * spread[:CHANNELS] ** (1 - WHITENING)
    # A component's sign is arbitrary; its largest entry decides.
    vectors *= np.sign(vectors[abs(vectors).argmax(0), np.arange(CHANNELS)])
    return torch.from_numpy(vectors / np.sqrt((vectors**2).mean())).float()


def true_latents(images: np.ndarray) -> torch.Tensor:
    """fp32 [B, CHANNELS, h, w] latents of uint8 [B, H, W, 3] pictures of the world."""
    vectors = patch_vectors()[true_codes(images)]
    return vectors.view(len(images), CELLS_A_SIDE, CELLS_A_SIDE, CHANNELS).permute(0, 3, 1, 2)


def build_vae(seed: int) -> AutoencoderKL:
    """FLUX's autoencoder with these widths and random weights."""
    torch.manual_seed(seed)
    module = empty_module(WIDTHS, 1, CHANNELS)
    head = module.encoder.conv_out
    with torch.no_grad():
        head.weight[CHANNELS:].zero_()
        head.bias[:CHANNELS], head.bias[CHANNELS:] = SHIFT, LOG_VARIANCE
    return module


def public_name(name: str, levels: int) -> str:
    """The checkpoint's name of a tensor of diffusers' module: the inverse of `vae.diffusers_name`."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"\.up\.(\d+)\.", lambda found: f".up.{levels - 1 - int(found[1])}.", name)


def save_vae(module: AutoencoderKL, folder: Path) -> None:
    """Write `ae.safetensors` in fp16 under the public names."""
    levels = len(module.config.block_out_channels)
    tensors = {}
    for name, parameter in module.state_dict().items():
        public = public_name(name, levels)
        # The public file's attention projects by convolutions of one pixel.
        shape = (*parameter.shape, 1, 1) if parameter.ndim == 2 else parameter.shape
        tensors[public] = parameter.reshape(shape).half().contiguous()
    save_file(tensors, folder / WEIGHTS)


def losses(module: AutoencoderKL, images: np.ndarray, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error of the latents, and absolute plus squared error of the pixels decoded from noisy ones."""
    pixels, latents = to_pixels(images), true_latents(images)
    found = SCALE * (module.encode(pixels).latent_dist.mean - SHIFT)
    sizes = NOISE * torch.rand(len(images), 1, 1, 1, generator=generator)
    noisy = latents + sizes * torch.randn(latents.shape, generator=generator)
    errors = module.decode(noisy / SCALE + SHIFT).sample - pixels
    return (found - latents).square().mean(), errors.abs().mean() + errors.square().mean()


def train_vae(module: AutoencoderKL, seed: int, log: Callable[[str], None], steps: int = STEPS) -> None:
    """Train in place."""
    rng, generator = random.Random(f"vae-{seed}"), torch.Generator().manual_seed(seed)
    module.requires_grad_(True).train()
    # The encoder's spread keeps the value that it has: its gradient is always zero.
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    for step in range(1, steps + 1):
        reading, drawing = losses(module, random_pictures(rng, BATCH), generator)
        optimizer.zero_grad(set_to_none=True)
        (reading + drawing).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            line = f"vae step {step}/{steps} latents {reading.item():.4f} pixels {drawing.item():.4f}"
            if step % 200 == 0 or step == steps:
                accuracy = [reconstruction_accuracy(FluxVae(module), 10_000 + seed, 100, noise) for noise in (0, 0.2)]
                line += f" exact reconstructions {accuracy[0]:.3f}, with noise {accuracy[1]:.3f}"
                module.requires_grad_(True).train()
            log(line)
    module.requires_grad_(False).eval()


@torch.no_grad()
def reconstruction_accuracy(vae: FluxVae, seed: int, count: int, noise: float = 0.0) -> float:
    """Share of pictures that the detector reads alike when encoded, disturbed by so much noise, and decoded."""
    images = random_pictures(random.Random(f"vae-check-{seed}"), count)
    latents = vae.encode(to_pixels(images) / 2 + 0.5)
    latents = latents + noise * torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    drawn = to_uint8(vae.decode(latents).cpu() * 2 - 1)
    return float(np.mean([seen(a) == seen(b) for a, b in zip(images, drawn, strict=True)]))
