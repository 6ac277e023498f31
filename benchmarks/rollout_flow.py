"""Drawing by rectified flow: our rollout in batches against one image at a time, as the public inferencer draws.

G images of every prompt, by the SDE with guidance. A batch reads each prompt once for its G images, and the weights
once for all of them; alone, an image pays for both. The latents of both sides are compared.

Two models: the tiny BAGEL of the package (4 latent tokens), and one of moderate width with --side squared tokens.
The limit is the rate of large matrix products.

example: python -m benchmarks.rollout_flow --width 512 --layers 4 --side 8 --prompts 2 --group 8
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path

import torch

from benchmarks import measuring
from benchmarks.measuring import Limits, Row
from benchmarks.models import bagel
from unified_rl.backbones.bagel.backbone import BagelBackbone
from unified_rl.backbones.bagel.flow import FlowSampling

PROMPTS = ("a photo of a red circle", "a photo of two blue squares", "a photo of a green ring left of a yellow cross")
TINY = Path("unified_rl/assets/tiny_bagel")
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.5}


def ours(backbone: BagelBackbone, prompts: list[str], group: int, sampling: FlowSampling) -> torch.Tensor:
    """Latents [P * G, N, D] of all images in one call."""
    return backbone.rollout_images(prompts, list(range(group * len(prompts))), sampling).final


def theirs(backbone: BagelBackbone, prompts: list[str], group: int, sampling: FlowSampling) -> torch.Tensor:
    """The same, image by image."""
    pairs = [(prompt, i * group + j) for i, prompt in enumerate(prompts) for j in range(group)]
    return torch.cat([backbone.rollout_images([prompt], [seed], sampling).final for prompt, seed in pairs])


def row(name: str, backbone: BagelBackbone, arguments: Namespace, limits: Limits) -> Row:
    """The comparison on one model."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(arguments.prompts)]
    sampling = FlowSampling(steps=arguments.steps, eta=0.7)
    sides = [partial(side, backbone, prompts, arguments.group, sampling) for side in (ours, theirs)]
    fast, slow, batch, singles = measuring.compare(*sides, arguments.repeats, arguments.clock)
    worst = float((batch - singles).abs().max())
    images = arguments.prompts * arguments.group
    print(f"{name}: {images / fast:.3g} images/s, largest difference of latents {worst:.1e}")
    if not worst <= TOLERANCE[next(backbone.model.parameters()).dtype]:
        raise SystemExit("the sides draw different images")
    part = limits.seconds(measuring.operations(sides[0])) / fast
    target = 2.0 if arguments.device == "cpu" else 3.0
    case = f"{name}, {backbone.painter.shape[0]} latent tokens, {arguments.prompts} x {arguments.group} images"
    return Row("rollout, flow", case, slow / fast, target, fast, slow, part)


def main(argv: list[str] | None = None) -> None:
    """Both models; on a GPU the random one alone."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--width", type=int, default=512, help="of the language model, a multiple of 256; 0: tiny only")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--head", type=int, default=64, help="width of an attention head; 128 for BAGEL-7B")
    parser.add_argument("--share", type=int, default=4, help="query heads of a key-value head; 7 for BAGEL-7B")
    parser.add_argument("--side", type=int, default=4, help="rows and columns of latent tokens, 16 x 16 pixels each")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--steps", type=int, default=9, help="of the flow")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    limits = Limits.measured(device, dtype, arguments.clock)
    print(limits)
    if device == "cpu":
        measuring.report([row("tiny", BagelBackbone.from_pretrained(TINY), arguments, limits)], arguments.out)
    if arguments.width:
        shape = (arguments.width, arguments.layers, arguments.side, arguments.head, arguments.share, device, dtype)
        name = f"width {arguments.width}"
        measuring.report([row(name, bagel(*shape), arguments, limits)], arguments.out)


if __name__ == "__main__":
    main()
