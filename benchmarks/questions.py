"""Several questions on one image, in one call and in one call each, side by side.

A call reads the image once for all its questions. Two gains are told apart by a third measurement, the same questions
in one call on images that differ in one pixel, where every row reads its own: what batching gives, and what sharing
adds. The models have the public shapes (Janus-Pro's 576 image tokens; BAGEL reading 336 x 336 pixels, 576 patches) at
moderate width, with random weights. Greedy answers are compared token by token.

example: python -m benchmarks.questions --questions 8 --tokens 16 --repeats 5
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from benchmarks import measuring
from benchmarks.measuring import Row
from benchmarks.models import bagel, janus
from unified_rl.backbones.base import TextTraj
from unified_rl.backbones.load import Backbone

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


def together(backbone: Backbone, images: list[np.ndarray], questions: list[str], tokens: int) -> list[TextTraj]:
    """All questions in one call."""
    return [backbone.rollout_text(images, questions, [0] * len(questions), tokens, 0.0)]


def singly(backbone: Backbone, images: list[np.ndarray], questions: list[str], tokens: int) -> list[TextTraj]:
    """A call for each question."""
    pairs = zip(images, questions, strict=True)
    return [backbone.rollout_text([image], [question], [0], tokens, 0.0) for image, question in pairs]


def difference(whole: TextTraj, singles: list[TextTraj]) -> float:
    """Largest difference of log-probs; the answers have to have the same tokens."""
    worst = 0.0
    for row, single in enumerate(singles):
        length = int(single.mask.sum())
        if not torch.equal(whole.ids[row, :length], single.ids[0, :length]) or whole.mask[row].sum() != length:
            raise SystemExit(f"question {row} is answered otherwise in one call than by itself")
        worst = max(worst, float((whole.log_probs[row, :length] - single.log_probs[0, :length]).abs().max()))
    return worst


def main(argv: list[str] | None = None) -> None:
    """Three comparisons for each family."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16, help="of every answer at most")
    parser.add_argument("--width", type=int, default=512, help="of the language model, a multiple of 256")
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    count, tokens = arguments.questions, arguments.tokens
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(count)]
    image = np.random.default_rng(0).integers(0, 256, (384, 384, 3), dtype=np.uint8)
    others = [image.copy() for _ in range(count)]
    for i, other in enumerate(others):
        other[0, 0, 0] = i
    for family, build in (("janus", janus), ("bagel", bagel)):
        backbone = build(arguments.width, arguments.layers)
        shared = partial(together, backbone, [image] * count, questions, tokens)
        for name, theirs in (
            ("one forward per question", partial(singly, backbone, [image] * count, questions, tokens)),
            ("one call, image not shared", partial(together, backbone, others, questions, tokens)),
        ):
            fast, slow, answers, singles = measuring.compare(shared, theirs, arguments.repeats, arguments.clock)
            checked = theirs.func is singly
            if checked:
                print(f"{family}: largest difference of log-probs {difference(answers[0], singles):.1e}")
            row = Row("questions", f"{family}, {name}", slow / fast, 3.0 if checked else None, fast, slow)
            measuring.report([row], arguments.out)


if __name__ == "__main__":
    main()
