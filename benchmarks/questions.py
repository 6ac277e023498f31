"""Several questions on one image, in one call and in one call each, side by side.

A call reads the image once for all its questions. Two gains are told apart by a third measurement, the same questions
in one call on images that differ in one pixel, where every row reads its own: what batching gives, and what sharing
adds. The models have the public shapes (Janus-Pro's 576 image tokens; BAGEL reading 336 x 336 pixels, 576 patches) at
moderate width, with random weights. Greedy answers are compared token by token.

example: python benchmarks/questions.py --questions 8 --tokens 16 --repeats 5
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import JanusConfig, JanusProcessor, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from unified_rl.backbones.bagel.backbone import BagelBackbone
from unified_rl.backbones.bagel.config import BagelConfig, LanguageConfig, VisionConfig
from unified_rl.backbones.bagel.inputs import InputSettings
from unified_rl.backbones.bagel.vae import FluxVae
from unified_rl.backbones.base import TextTraj
from unified_rl.backbones.janus import JanusBackbone, JanusForConditionalGeneration
from unified_rl.backbones.load import Backbone
from unified_rl.shapes import tiny_bagel, tiny_janus
from unified_rl.shapes.train_vae import CHANNELS, build_vae, save_vae

QUESTIONS = (
    "is there a red circle?",
    "how many blue squares are there?",
    "what colour is the ring?",
    "is the cross left of the diamond?",
    "describe the image in detail.",
    "is there anything above the triangle?",
    "what shape is green?",
    "are there more circles than squares?",
)


def janus(width: int, layers: int) -> JanusBackbone:
    """384 x 384 pixels as 24 x 24 patches; a vision tower of half the language model's width."""
    tokenizer = tiny_janus.build_tokenizer()
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=11 * width // 4,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=width // 2,
            num_hidden_layers=layers,
            num_attention_heads=width // 128,
            image_size=384,
            patch_size=16,
            projection_dim=width,
            num_image_tokens=576,
        ),
        vq_config=JanusVQVAEConfig(
            base_channels=32,
            latent_channels=32,
            channel_multiplier=[1] * 5,
            num_res_blocks=1,
            projection_dim=width,
            image_token_embed_dim=width,
        ),
        image_token_id=tokenizer.image_token_id,
    )
    images = JanusImageProcessorPil(
        size={"height": 384, "width": 384}, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_size=14
    )
    processor = JanusProcessor(
        image_processor=images, tokenizer=tokenizer, chat_template=tiny_janus.CHAT_TEMPLATE, num_image_tokens=576
    )
    torch.manual_seed(0)
    return JanusBackbone(JanusForConditionalGeneration(config), processor)


def bagel(width: int, layers: int) -> BagelBackbone:
    """336 x 336 pixels as 24 x 24 patches; a vision tower of half the language model's width."""
    tokenizer = tiny_bagel.build_tokenizer()
    heads = width // 64
    config = BagelConfig(
        LanguageConfig(width, 11 * width // 4, layers, heads, heads // 4, len(tokenizer)),
        VisionConfig(hidden=width // 2, intermediate=2 * width, layers=layers, heads=heads // 2, patch=14, side=24),
        latent_patch=tiny_bagel.LATENT_PATCH,
        latent_channels=CHANNELS,
        latent_side=8,
    )
    settings = InputSettings(longest=336, drawn=(32, 32))
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        save_vae(build_vae(0), Path(folder))
        vae = FluxVae.from_folder(Path(folder), device)
    return BagelBackbone(tiny_bagel.random_model(config, 0), vae, tokenizer, settings, device)


def together(backbone: Backbone, images: list[np.ndarray], questions: list[str], tokens: int) -> list[TextTraj]:
    """All questions in one call."""
    return [backbone.rollout_text(images, questions, [0] * len(questions), tokens, 0.0)]


def singly(backbone: Backbone, images: list[np.ndarray], questions: list[str], tokens: int) -> list[TextTraj]:
    """A call for each question."""
    pairs = zip(images, questions, strict=True)
    return [backbone.rollout_text([image], [question], [0], tokens, 0.0) for image, question in pairs]


def timed(function: Callable[[], list], repeats: int) -> tuple[float, list]:
    """(median seconds, last result) after one warm-up call."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def difference(whole: TextTraj, singles: list[TextTraj]) -> float:
    """Largest difference of log-probs; the answers have to have the same tokens."""
    worst = 0.0
    for row, single in enumerate(singles):
        length = int(single.mask.sum())
        if not torch.equal(whole.ids[row, :length], single.ids[0, :length]) or whole.mask[row].sum() != length:
            raise SystemExit(f"question {row} is answered otherwise in one call than by itself")
        worst = max(worst, float((whole.log_probs[row, :length] - single.log_probs[0, :length]).abs().max()))
    return worst


def main() -> None:
    """Print one line per family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16, help="of every answer at most")
    parser.add_argument("--width", type=int, default=512, help="of the language model, a multiple of 256")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    count, tokens = arguments.questions, arguments.tokens
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(count)]
    image = np.random.default_rng(0).integers(0, 256, (384, 384, 3), dtype=np.uint8)
    others = [image.copy() for _ in range(count)]
    for i, other in enumerate(others):
        other[0, 0, 0] = i
    print("family  one call s  one each s  ratio  not shared s  ratio  max log-prob diff")
    for family, build in (("janus", janus), ("bagel", bagel)):
        backbone = build(arguments.width, arguments.layers)
        fast, shared = timed(partial(together, backbone, [image] * count, questions, tokens), arguments.repeats)
        slow, singles = timed(partial(singly, backbone, [image] * count, questions, tokens), arguments.repeats)
        apart, _ = timed(partial(together, backbone, others, questions, tokens), arguments.repeats)
        print(
            f"{family:6s}  {fast:10.2f}  {slow:10.2f}  {slow / fast:5.1f}  {apart:12.2f}  {apart / fast:5.1f}  "
            f"{difference(shared[0], singles):17.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
