"""GvU's reward against what people run: the token-by-token product, and a naive batch padded to the longest.

The product is what the paper writes and what the released code runs: one full forward per prompt token over a growing
sequence. It is compared image by image, on the tiny Janus.

The naive batch holds prompts of mixed lengths, each with its image, as one sequence padded to the longest, and computes
the text head's logits of every position. Ours computes those of the prompts' tokens alone. It is compared on a
Janus of moderate width with a vocabulary of the public size.

Both sides score the same pictures; the largest relative difference of the rewards is checked.

example: python -m benchmarks.reward --images 16 --width 512 --repeats 5
"""

from __future__ import annotations

import random
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import measuring
from benchmarks.measuring import Limits, Row
from benchmarks.models import janus
from unified_rl.backbones.janus import JanusBackbone
from unified_rl.reward.gvu import gvu_scores
from unified_rl.shapes.questions import random_scene
from unified_rl.shapes.world import render

TINY = Path("unified_rl/assets/tiny_janus")
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
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


def one_forward(judge: JanusBackbone, images: list[np.ndarray], prompt: str) -> list[float]:
    """Rewards of the package, image by image."""
    return [gvu_scores(judge, [image], [prompt], QUESTION)[0].geometric_mean for image in images]


def product_loops(judge: JanusBackbone, images: list[np.ndarray], prompt: str) -> list[float]:
    """Rewards by the loop, image by image."""
    return [product_loop(judge, image, prompt) for image in images]


def batched(judge: JanusBackbone, images: list[np.ndarray], prompts: list[str]) -> list[float]:
    """Rewards of the package, all in one call."""
    return [score.geometric_mean for score in gvu_scores(judge, images, prompts, QUESTION)]


@torch.inference_mode()
def padded(judge: JanusBackbone, images: list[np.ndarray], prompts: list[str]) -> list[float]:
    """Rewards by one forward over whole sequences, with logits in fp32 of all their positions."""
    ids, mask, pixels = judge.inputs.reading(images, [QUESTION] * len(images))
    answers, kept = judge.inputs.responses(prompts, end_of_turn=False)
    logits = judge.model(
        input_ids=torch.cat([ids, answers], 1),
        attention_mask=torch.cat([mask, kept.long()], 1),
        pixel_values=pixels.to(judge.model.dtype),
        use_cache=False,
    ).logits.float()
    log_probs = logits.log_softmax(-1)[:, ids.shape[1] - 1 : -1].gather(-1, answers[..., None])[..., 0]
    return ((log_probs * kept).sum(1) / kept.sum(1)).exp().tolist()


def row(case: str, target: float, ours: partial, theirs: partial, arguments: Namespace, limits: Limits) -> Row:
    """The comparison of two ways to the same rewards."""
    fast, slow, scores, others = measuring.compare(ours, theirs, arguments.repeats, arguments.clock)
    worst = max(abs(a - b) / b for a, b in zip(scores, others, strict=True))
    print(f"{case}: {len(scores) / fast:.3g} images/s, largest relative difference of rewards {worst:.1e}")
    if not worst <= TOLERANCE[ours.args[0].model.dtype]:
        raise SystemExit("the sides give different rewards")
    part = limits.seconds(measuring.operations(ours)) / fast
    return Row("GvU reward", case, slow / fast, target, fast, slow, part)


def main(argv: list[str] | None = None) -> None:
    """One line per length of prompt against the loop, one against the padded batch."""
    parser = measuring.parser(__doc__, repeats=5)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--width", type=int, default=512, help="of the model of the padded batch, a multiple of 256")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--head", type=int, default=64, help="width of an attention head; 128 for Janus-Pro")
    parser.add_argument("--side", type=int, default=8, help="rows and columns of its images' patches; Janus-Pro: 24")
    parser.add_argument("--vocabulary", type=int, default=102400)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    limits = Limits.measured(device, dtype, arguments.clock)
    print(limits)
    rng = random.Random(0)
    images = [render(random_scene(rng, 3)) for _ in range(arguments.images)]
    judge = JanusBackbone.from_pretrained(TINY, dtype, device)
    for prompt in PROMPTS:
        # One image at a time on both sides: the gain of batching comes on top.
        sides = (partial(side, judge, images, prompt) for side in (one_forward, product_loops))
        tokens = judge.inputs.responses([prompt], end_of_turn=False)[0].shape[1]
        target = 5.0 if device == "cpu" else 10.0
        measuring.report([row(f"token loop, {tokens} tokens", target, *sides, arguments, limits)], arguments.out)
    judge = janus(
        arguments.width, arguments.layers, arguments.side, arguments.head, arguments.vocabulary, device, dtype
    )
    lengths = [" and ".join(["a red circle"] * (1 + i % 8)) for i in range(len(images))]
    sides = (partial(side, judge, images, lengths) for side in (batched, padded))
    measuring.report([row("padded batch, mixed lengths", 1.3, *sides, arguments, limits)], arguments.out)


if __name__ == "__main__":
    main()
