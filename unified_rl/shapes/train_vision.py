"""Training of the tiny checkpoint's vision tower before it meets the language model.

The public models take a tower that was trained on pictures (SigLIP); here a linear probe on the four patches of each
cell learns to name what the cell shows. The probe is thrown away.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.janus.modeling_janus import JanusVisionModel

from unified_rl.shapes.questions import random_scene
from unified_rl.shapes.world import GRID, OBJECTS, cell_index, render

STEPS = 300
BATCH = 64
LEARNING_RATE = 1.0e-3


def labelled_pictures(rng: random.Random, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [count, 3, H, W] in -1..1 and int64 [count, cells] indices of what each cell shows."""
    scenes = [random_scene(rng, rng.randint(0, GRID * GRID)) for _ in range(count)]
    images = torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2)
    return images.float() / 127.5 - 1, torch.tensor([[cell_index(item) for item in s] for s in scenes])


def cell_features(patches: torch.Tensor) -> torch.Tensor:
    """[B, cells, 4 * D] from patch features [B, side * side, D]: the patches of each cell side by side."""
    side = int(patches.shape[1] ** 0.5)
    per_cell = side // GRID
    grid = patches.view(len(patches), GRID, per_cell, GRID, per_cell, -1).transpose(2, 3)
    return grid.reshape(len(patches), GRID * GRID, -1)


def train_vision(tower: JanusVisionModel, seed: int, log: Callable[[str], None], steps: int = STEPS) -> None:
    """Train in place."""
    rng = random.Random(f"vision-{seed}")
    torch.manual_seed(seed)
    tower.requires_grad_(True)
    patches_a_cell = (tower.config.image_size // tower.config.patch_size // GRID) ** 2
    probe = nn.Linear(patches_a_cell * tower.config.hidden_size, 1 + len(OBJECTS))
    parameters = [*tower.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        images, labels = labelled_pictures(rng, BATCH)
        logits = probe(cell_features(tower(images).last_hidden_state))
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            right = (logits.argmax(-1) == labels).float().mean()
            log(f"vision step {step}/{steps} loss {loss.item():.4f} cells named {right.item():.3f}")
    tower.requires_grad_(False)
