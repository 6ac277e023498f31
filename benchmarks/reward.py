"""GvU's reward by one teacher-forced forward against the token-by-token product, side by side.

The product is what the paper writes and what the released code runs: one full forward per prompt token over a growing
sequence. Both sides score the same pictures; the largest relative difference of the rewards is printed beside the
ratio of their median times.

example: python benchmarks/reward.py --checkpoint unified_rl/assets/tiny_janus --images 16 --repeats 5
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from unified_rl.backbones.janus import JanusBackbone
from unified_rl.reward.gvu import GvuScore, gvu_scores
from unified_rl.shapes.questions import random_scene
from unified_rl.shapes.world import render

QUESTION = "Describe the image in detail."
PROMPTS = (
    "a photo of a red circle and a blue square and a green ring",
    "a photo of a yellow cross and a cyan diamond and a magenta triangle and a red ring",
    "a photo of a blue ring left of a red square and a green cross above a yellow circle and a cyan diamond",
)


@torch.inference_mode()
def product_loop(judge: JanusBackbone, image: np.ndarray, prompt: str) -> float:
    """Geometric mean of next-token probabilities, one forward per token (float product, as in the paper)."""
    ids, mask, pixels = judge.inputs.reading([image], [QUESTION])
    response, _ = judge.inputs.responses([prompt], end_of_turn=False)
    product = 1.0
    for token in response[0]:
        logits = judge.model(input_ids=ids, attention_mask=mask, pixel_values=pixels, logits_to_keep=1).logits
        product *= float(logits[0, -1].float().softmax(-1)[token])
        ids = torch.cat([ids, token.view(1, 1)], 1)
        mask = torch.ones_like(ids)
    return product ** (1 / response.shape[1])


def one_forward(judge: JanusBackbone, images: list[np.ndarray], prompt: str) -> list[GvuScore]:
    """Scores of the package, image by image."""
    return [gvu_scores(judge, [image], [prompt], QUESTION)[0] for image in images]


def product_loops(judge: JanusBackbone, images: list[np.ndarray], prompt: str) -> list[float]:
    """Rewards by the loop, image by image."""
    return [product_loop(judge, image, prompt) for image in images]


def timed(function: Callable[[], list], repeats: int) -> tuple[float, list]:
    """(median seconds, last result) after one warm-up call."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def main() -> None:
    """Print one line per prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("unified_rl/assets/tiny_janus"))
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    judge = JanusBackbone.from_pretrained(arguments.checkpoint)
    rng = random.Random(0)
    images = [render(random_scene(rng, 3)) for _ in range(arguments.images)]
    print("tokens  one forward ms  product ms   ratio  ratio/tokens  max rel. diff")
    for prompt in PROMPTS:
        # One image at a time on both sides: the gain of batching comes on top.
        fast, scores = timed(partial(one_forward, judge, images, prompt), arguments.repeats)
        slow, products = timed(partial(product_loops, judge, images, prompt), arguments.repeats)
        tokens = len(scores[0].tokens)
        worst = max(abs(s.geometric_mean - p) / p for s, p in zip(scores, products, strict=True))
        per_image = 1e3 / len(images)
        ratio = slow / fast
        print(
            f"{tokens:6d}  {fast * per_image:14.2f}  {slow * per_image:10.2f}  {ratio:6.1f}  {ratio / tokens:12.2f}  "
            f"{worst:13.1e}"
        )
        assert math.isfinite(worst)


if __name__ == "__main__":
    main()
