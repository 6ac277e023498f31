"""Training of the tiny checkpoints' vision tower and aligner before they meet the language model.

The public models take a tower whose features were matched with words (SigLIP). Here each patch learns to name colour
and shape of its cell in the language model's own word vectors, so that a word of a question can be found in a picture.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase

from unified_rl.shapes.questions import random_scene
from unified_rl.shapes.tiny_janus import PATCH
from unified_rl.shapes.train_vq import to_pixels
from unified_rl.shapes.world import CELL, COLORS, GRID, SHAPES, Scene, render

STEPS = 150
BATCH = 64
LEARNING_RATE = 1.0e-3
SHARPNESS = 2.0  # of the logits, of word vectors at unit length; the features grow until it suffices
PROPERTIES = (tuple(COLORS), SHAPES)
NAMES = ("colour", "shape", "column", "row")
# What the judge's questions call a cell's left and lower edge, among the columns and the rows.
PLACES = (
    tuple(f"({column * CELL}," for column in range(GRID)),
    tuple(f"{(row + 1) * CELL})" for row in range(GRID)),
)


def word_vectors(embeddings: torch.Tensor, tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...]) -> torch.Tensor:
    """fp32 [len(words), D] unit vectors: the token embeddings [vocabulary, D] of words that are one token each."""
    ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
    if any(len(i) != 1 for i in ids):
        raise ValueError(f"not every word of {words} is one token: {ids}")
    return F.normalize(embeddings.detach()[[i[0] for i in ids]], dim=-1)


def patch_labels(scene: Scene, patch: int) -> np.ndarray:
    """int64 [2, patches]: index of colour and of shape in every patch, -1 in empty cells, patches in reading order."""
    colors, shapes = PROPERTIES[0], PROPERTIES[1]
    names = [(-1, -1) if item is None else (colors.index(item.color), shapes.index(item.shape)) for item in scene]
    grid = np.array(names).reshape(GRID, GRID, 2).repeat(CELL // patch, 0).repeat(CELL // patch, 1)
    return grid.reshape(-1, 2).T


def place_labels(patch: int) -> np.ndarray:
    """int64 [2, patches]: column and row of every patch's cell, patches in reading order."""
    cells = np.arange(GRID).repeat(CELL // patch)
    rows, columns = np.meshgrid(cells, cells, indexing="ij")
    return np.stack([columns.ravel(), rows.ravel()])


def labelled_pictures(rng: random.Random, count: int, patch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [count, 3, H, W] in -1..1 and int64 [count, 4, patches] labels: of PROPERTIES, then of PLACES."""
    scenes = [random_scene(rng, rng.randint(1, GRID * GRID)) for _ in range(count)]
    images = to_pixels(np.stack([render(s) for s in scenes]))
    labels = [np.concatenate([patch_labels(s, patch), place_labels(patch)]) for s in scenes]
    return images, torch.from_numpy(np.stack(labels))


def train_vision(
    features: Callable[[torch.Tensor], torch.Tensor],
    parameters: Sequence[nn.Parameter],
    vectors: Sequence[torch.Tensor],
    seed: int,
    log: Callable[[str], None],
    steps: int = STEPS,
) -> None:
    """Train a tower and its aligner in place.

    Args:
        features: [B, patches, D] of pixels [B, 3, H, W] in -1..1, through `parameters`.
        vectors: of the first of PROPERTIES and PLACES, or of all, see `word_vectors`.
    """
    rng = random.Random(f"vision-{seed}")
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        images, labels = labelled_pictures(rng, BATCH, PATCH)
        seen = features(images)
        logits = [SHARPNESS * seen @ words.T for words in vectors]
        losses = [F.cross_entropy(x.transpose(1, 2), labels[:, i], ignore_index=-1) for i, x in enumerate(logits)]
        optimizer.zero_grad(set_to_none=True)
        sum(losses).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            shown = labels[:, 0] >= 0
            right = [float((x.argmax(-1) == labels[:, i])[shown].float().mean()) for i, x in enumerate(logits)]
            rates = ", ".join(f"{name} {rate:.3f}" for name, rate in zip(NAMES, right, strict=False))
            log(f"vision step {step}/{steps} patches with the right {rates}")
    for parameter in parameters:
        parameter.requires_grad_(False)
