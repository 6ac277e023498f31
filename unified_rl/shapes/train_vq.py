"""Training of the tiny checkpoint's image tokenizer (VQ): pictures to 16 codes and back without a visible loss.

Every distinct patch of the world has its own code. An encoder left to choose writes each patch in a way that depends
on the whole picture (its normalisations and attention see all of it), and no language model of this size learns to
draw in such a script.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from transformers.models.janus.modeling_janus import JanusModel, JanusVQVAE

from unified_rl.shapes.questions import random_scene
from unified_rl.shapes.tiny_janus import PATCH
from unified_rl.shapes.world import GRID, OBJECTS, detect, render

STEPS = 1000
BATCH = 32
LEARNING_RATE = 2.0e-3
SHARPNESS = 16.0  # of the logits between encoder outputs and codes, both at unit length
ROW_SCALE = 0.05  # standard deviation of the codes' first input vectors and output rows


def random_pictures(rng: random.Random, count: int) -> np.ndarray:
    """uint8 [count, H, W, 3]: scenes of 0 to 4 random objects."""
    return np.stack([render(random_scene(rng, rng.randint(0, GRID * GRID))) for _ in range(count)])


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """fp32 [B, 3, H, W] in -1..1 from uint8 [B, H, W, 3]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """uint8 [B, H, W, 3] from [B, 3, H, W] in -1..1."""
    return ((pixels.permute(0, 2, 3, 1) + 1) * 127.5).clamp(0, 255).round().byte().numpy()


def patches(images: np.ndarray) -> np.ndarray:
    """uint8 [B * H/PATCH * W/PATCH, PATCH * PATCH * 3] from uint8 [B, H, W, 3], in reading order."""
    count, height, width, _ = images.shape
    grid = images.reshape(count, height // PATCH, PATCH, width // PATCH, PATCH, 3)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(-1, PATCH * PATCH * 3)


@lru_cache(maxsize=1)
def patch_codes() -> dict[bytes, int]:
    """The code of every distinct patch of the world, by its bytes."""
    scenes = [(item, *[None] * (GRID * GRID - 1)) for item in (None, *OBJECTS)]
    distinct = {patch.tobytes() for patch in patches(np.stack([render(s) for s in scenes]))}
    return {patch: code for code, patch in enumerate(sorted(distinct))}


def true_codes(images: np.ndarray) -> torch.Tensor:
    """int64 [B, patches] codes of uint8 [B, H, W, 3] pictures of the world."""
    known = patch_codes()
    return torch.tensor([known[patch.tobytes()] for patch in patches(images)]).view(len(images), -1)


def similarities(vq: JanusVQVAE, pixels: torch.Tensor) -> torch.Tensor:
    """Cosines [B, patches, codes] of encoder outputs and codes, for pixels [B, 3, H, W] in -1..1."""
    outputs = F.normalize(vq.quant_conv(vq.encoder(pixels)), dim=1).flatten(2).transpose(1, 2)
    return outputs @ F.normalize(vq.quantize.embedding.weight, dim=1).T


def losses(vq: JanusVQVAE, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the codes (nats a patch), and absolute plus squared error of the decoded pixels."""
    pixels, codes = to_pixels(images), true_codes(images)
    reading = F.cross_entropy((SHARPNESS * similarities(vq, pixels)).flatten(0, 1), codes.flatten())
    errors = vq.decode(codes) - pixels
    return reading, errors.abs().mean() + errors.square().mean()


def train_vq(vq: JanusVQVAE, seed: int, log: Callable[[str], None], steps: int = STEPS) -> None:
    """Train in place; the codebook is left unit-norm, so that encode and decode agree."""
    rng, generator = random.Random(f"vq-{seed}"), torch.Generator().manual_seed(seed)
    vq.requires_grad_(True)
    torch.nn.init.normal_(vq.quantize.embedding.weight, generator=generator)
    optimizer = torch.optim.AdamW(vq.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    for step in range(1, steps + 1):
        reading, drawing = losses(vq, random_pictures(rng, BATCH))
        optimizer.zero_grad(set_to_none=True)
        (reading + drawing).backward()
        torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            accuracy = reconstruction_accuracy(vq, seed=10_000 + seed, count=100)
            values = f"codes {reading.item():.4f} pixels {drawing.item():.4f}"
            log(f"vq step {step}/{steps} {values} exact reconstructions {accuracy:.3f}")
    book = vq.quantize.embedding.weight
    book.data = F.normalize(book.data, dim=1)
    vq.requires_grad_(False).eval()


@torch.no_grad()
def start_codes_alike(model: JanusModel, seed: int) -> None:
    """Give codes of patches that look alike similar input vectors and output rows, in place.

    Otherwise "red" means something new for each of two dozen codes, and a small language model draws every object in
    a random colour for thousands of steps.
    """
    pixels = torch.tensor([list(patch) for patch in patch_codes()], dtype=torch.float32).view(-1, PATCH * PATCH, 3)
    # The mean colour counts as much as all pixels together.
    looks = torch.cat([pixels.flatten(1), PATCH * pixels.mean(1)], dim=1)
    looks = looks - looks.mean(0)
    generator = torch.Generator().manual_seed(seed)
    for rows in (model.generation_embeddings.weight, model.generation_head.vision_head.weight):
        vectors = looks @ torch.randn(looks.shape[1], rows.shape[1], generator=generator)
        rows.copy_(ROW_SCALE * vectors / vectors.std())


@torch.no_grad()
def reconstruction_accuracy(vq: JanusVQVAE, seed: int, count: int) -> float:
    """Share of pictures whose reconstruction the detector reads exactly as the original."""
    images = random_pictures(random.Random(f"vq-check-{seed}"), count)
    drawn = to_uint8(vq.decode(similarities(vq, to_pixels(images)).argmax(-1)))
    return float(np.mean([seen(a) == seen(b) for a, b in zip(images, drawn, strict=True)]))


def seen(image: np.ndarray) -> list[tuple]:
    """What the detector sees, without its distances."""
    return [(d.shape, d.color, d.row, d.column) for d in detect(image)]
