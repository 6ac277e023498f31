"""Training of the tiny checkpoint's image tokenizer (VQ): pictures to 16 codes and back without a visible loss."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from transformers.models.janus.modeling_janus import JanusVQVAE

from unified_rl.shapes.questions import random_scene
from unified_rl.shapes.world import detect, render

STEPS = 1500
BATCH = 32
LEARNING_RATE = 2.0e-3
COMMITMENT = 0.25
RESTART_EVERY = 25  # steps; codes unused since the last time take the place of a random encoder output
RESTART_UNTIL = 2 / 3  # of the steps


def random_pictures(rng: random.Random, count: int) -> torch.Tensor:
    """fp32 [count, 3, H, W] in -1..1: scenes of 0 to 4 random objects."""
    images = np.stack([render(random_scene(rng, rng.randint(0, 4))) for _ in range(count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def quantise(vq: JanusVQVAE, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit-norm encoder outputs [N, D], codes [N], straight-through latents [B, D, h, w], commitment loss."""
    z = F.normalize(vq.quant_conv(vq.encoder(images)), dim=1)
    flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
    book = F.normalize(vq.quantize.embedding.weight, dim=1)
    codes = (flat @ book.T).argmax(1)
    chosen = book[codes].view(z.shape[0], z.shape[2], z.shape[3], -1).permute(0, 3, 1, 2)
    commitment = COMMITMENT * (z - chosen.detach()).square().sum(1).mean()
    commitment = commitment + (z.detach() - chosen).square().sum(1).mean()
    return flat.detach(), codes, z + (chosen - z).detach(), commitment


def train_vq(vq: JanusVQVAE, seed: int, log: Callable[[str], None], steps: int = STEPS) -> None:
    """Train in place; the codebook is left unit-norm, so that encode and decode agree."""
    rng, generator = random.Random(f"vq-{seed}"), torch.Generator().manual_seed(seed)
    vq.requires_grad_(True)
    torch.nn.init.normal_(vq.quantize.embedding.weight, generator=generator)
    optimizer = torch.optim.AdamW(vq.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    used = torch.zeros(vq.quantize.embedding.num_embeddings)
    for step in range(1, steps + 1):
        images = random_pictures(rng, BATCH)
        flat, codes, latents, commitment = quantise(vq, images)
        pixels = vq.decoder(vq.post_quant_conv(latents))
        loss = (pixels - images).abs().mean() + (pixels - images).square().mean() + commitment
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        used += torch.bincount(codes, minlength=len(used))
        if step % RESTART_EVERY == 0 and step < RESTART_UNTIL * steps:
            dead = (used == 0).nonzero()[:, 0]
            picks = torch.randint(len(flat), (len(dead),), generator=generator)
            vq.quantize.embedding.weight.data[dead] = flat[picks]
            used.zero_()
        if step % 100 == 0 or step == steps:
            accuracy = reconstruction_accuracy(vq, seed=10_000 + seed, count=100)
            log(f"vq step {step}/{steps} loss {loss.item():.4f} exact reconstructions {accuracy:.3f}")
    book = vq.quantize.embedding.weight
    book.data = F.normalize(book.data, dim=1)
    vq.requires_grad_(False).eval()


@torch.no_grad()
def reconstruction_accuracy(vq: JanusVQVAE, seed: int, count: int) -> float:
    """Share of pictures whose reconstruction the detector reads exactly as the original."""
    images = random_pictures(random.Random(f"vq-check-{seed}"), count)
    _, codes, _, _ = quantise(vq, images)
    pixels = vq.decode(codes.view(count, -1))
    return float(np.mean([_seen(a) == _seen(b) for a, b in zip(to_uint8(images), to_uint8(pixels), strict=True)]))


def to_uint8(pixels: torch.Tensor) -> np.ndarray:
    """uint8 [B, H, W, 3] from [B, 3, H, W] in -1..1."""
    return ((pixels.permute(0, 2, 3, 1) + 1) * 127.5).clamp(0, 255).round().byte().numpy()


def _seen(image: np.ndarray) -> list[tuple]:
    return [(d.shape, d.color, d.row, d.column) for d in detect(image)]
