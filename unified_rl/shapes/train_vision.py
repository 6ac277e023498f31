"""Training of the tiny checkpoint's vision tower and aligner before they meet the language model.

The public models take a tower whose features were matched with words (SigLIP). Here each patch learns to name colour
and shape of its cell in the language model's own word vectors, so that a word of a question can be found in a picture.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.models.janus.modeling_janus import JanusModel

from unified_rl.shapes.questions import random_scene
from unified_rl.shapes.train_vq import to_pixels
from unified_rl.shapes.world import CELL, COLORS, GRID, SHAPES, Object, Scene, render

STEPS = 300
BATCH = 64
LEARNING_RATE = 1.0e-3
SHARPNESS = 12.0  # of the logits; word vectors are used at unit length
PROPERTIES = (tuple(COLORS), SHAPES)


def word_vectors(model: JanusModel, tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...]) -> torch.Tensor:
    """fp32 [len(words), D] unit vectors: the token embeddings of words that are one token each."""
    ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
    if any(len(i) != 1 for i in ids):
        raise ValueError(f"not every word of {words} is one token: {ids}")
    return F.normalize(model.language_model.embed_tokens.weight.detach()[[i[0] for i in ids]], dim=-1)


def patch_labels(scene: Scene, patch: int) -> np.ndarray:
    """int64 [2, patches]: index of colour and of shape in every patch, -1 in empty cells, patches in reading order."""
    names = [(-1, -1) if item is None else _indices(item) for item in scene]
    grid = np.array(names).reshape(GRID, GRID, 2).repeat(CELL // patch, 0).repeat(CELL // patch, 1)
    return grid.reshape(-1, 2).T


def _indices(item: Object) -> tuple[int, int]:
    return PROPERTIES[0].index(item.color), PROPERTIES[1].index(item.shape)


def labelled_pictures(rng: random.Random, count: int, patch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [count, 3, H, W] in -1..1 and int64 [count, 2, patches] labels."""
    scenes = [random_scene(rng, rng.randint(1, GRID * GRID)) for _ in range(count)]
    images = to_pixels(np.stack([render(s) for s in scenes]))
    return images, torch.from_numpy(np.stack([patch_labels(s, patch) for s in scenes]))


def train_vision(
    model: JanusModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    log: Callable[[str], None],
    steps: int = STEPS,
) -> None:
    """Train `model.vision_model` and `model.aligner` in place."""
    rng = random.Random(f"vision-{seed}")
    vectors = [word_vectors(model, tokenizer, words) for words in PROPERTIES]
    parameters = [*model.vision_model.parameters(), *model.aligner.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for step in range(1, steps + 1):
        images, labels = labelled_pictures(rng, BATCH, model.vision_model.config.patch_size)
        features = model.aligner(model.vision_model(images).last_hidden_state)
        logits = [SHARPNESS * features @ words.T for words in vectors]
        losses = [F.cross_entropy(x.transpose(1, 2), labels[:, i], ignore_index=-1) for i, x in enumerate(logits)]
        optimizer.zero_grad(set_to_none=True)
        sum(losses).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            shown = labels[:, 0] >= 0
            right = [float((x.argmax(-1) == labels[:, i])[shown].float().mean()) for i, x in enumerate(logits)]
            log(f"vision step {step}/{steps} patches with the right colour {right[0]:.3f}, shape {right[1]:.3f}")
    for parameter in parameters:
        parameter.requires_grad_(False)
