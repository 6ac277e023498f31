"""Drawing by image tokens: our rollout against transformers' `generate(generation_mode="image")`, side by side.

G images of a prompt, the whole distribution at temperature 1 on both sides. transformers computes the branch without
the prompt whatever the scale, and refuses a scale of 1: there it is given a processor that keeps the branch with the
prompt. Sides that sample by different streams draw different tokens, so the check is another: `generate` is run
with our tokens forced, and its log-probs of them are compared with ours.

The limit is that of every step: reading the weights and what is cached, or the matrix products.

example: python -m benchmarks.rollout_tokens --width 512 --layers 8 --group 8 --repeats 3
"""

from __future__ import annotations

from functools import partial

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import ClassifierFreeGuidanceLogitsProcessor

from benchmarks import measuring
from benchmarks.measuring import Limits, Row
from benchmarks.models import janus
from unified_rl.backbones.base import Sampling, TokenTraj
from unified_rl.backbones.janus import JanusBackbone

PROMPT = "a photo of a red circle and a blue square"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
TARGETS = {"cpu": {5.0: 1.5, 1.0: 2.0}, "cuda": {5.0: 4.0, 1.0: 4.0}}


class KeepPrompted(LogitsProcessor):
    """Guidance of scale 1: the rows with the prompt."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[B, V] of [2B, V]."""
        return scores.chunk(2)[0]


class Forced(LogitsProcessor):
    """Makes `generate` take given tokens [B, S], and keeps its own log-probs of them."""

    def __init__(self, actions: torch.Tensor) -> None:
        self.actions = actions
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[B, V], 0 at the given token and minus infinity elsewhere."""
        token = self.actions[:, len(self.log_probs), None]
        self.log_probs.append(scores.float().log_softmax(-1).gather(-1, token)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


def ours(backbone: JanusBackbone, group: int, scale: float) -> TokenTraj:
    """G images by the rollout."""
    return backbone.rollout_images([PROMPT], list(range(group)), Sampling(guidance_scale=scale))


def theirs(backbone: JanusBackbone, group: int, scale: float, forced: Forced | None = None) -> torch.Tensor:
    """int64 [G, S] tokens by `generate`."""
    ids, mask = backbone.inputs.drawing([PROMPT])
    guidance = ClassifierFreeGuidanceLogitsProcessor(scale) if scale > 1 else KeepPrompted()
    tokenizer = backbone.tokenizer
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        guidance_scale=1.0,  # by `guidance` instead, which alone can come before `forced`
        num_return_sequences=group,
        max_length=ids.shape[1] + backbone.image_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        generation_kwargs={"boi_token_id": backbone.inputs.boi_id},
    )
    processors = LogitsProcessorList([guidance, *([forced] if forced else [])])
    with torch.inference_mode():
        return backbone.model.generate(
            inputs=ids, attention_mask=mask, generation_mode="image", generation_config=config,
            logits_processor=processors,
        )  # fmt: skip


def difference(backbone: JanusBackbone, drawn: TokenTraj, scale: float) -> float:
    """Largest difference between our log-probs and theirs of the tokens that we drew."""
    forced = Forced(drawn.actions)
    taken = theirs(backbone, len(drawn.actions), scale, forced)
    if not torch.equal(taken, drawn.actions):
        raise SystemExit("transformers did not take the tokens that it was given")
    return float((torch.stack(forced.log_probs, 1) - drawn.log_probs).abs().max())


def least_seconds(backbone: JanusBackbone, rows: int, limits: Limits) -> float:
    """Of drawing with `rows` rows in the batch."""
    inner = backbone.model.model
    config = inner.language_model.config
    weights = measuring.weight_bytes(inner.language_model.layers, inner.generation_head, inner.generation_aligner)
    size = next(inner.language_model.parameters()).element_size()
    cached = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * size
    length = backbone.inputs.drawing([PROMPT])[0].shape[1] + backbone.image_tokens / 2  # on average
    step = limits.seconds(2 * rows * (weights + length * cached) / size, weights + rows * length * cached)
    return backbone.image_tokens * step


def main(argv: list[str] | None = None) -> None:
    """With guidance 5 and without."""
    parser = measuring.parser(__doc__)
    parser.add_argument("--width", type=int, default=512, help="of the language model, a multiple of 256")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--head", type=int, default=64, help="width of an attention head; 128 for Janus-Pro")
    parser.add_argument("--side", type=int, default=24, help="rows and columns of image tokens")
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    device, dtype, group = arguments.device, getattr(torch, arguments.dtype), arguments.group
    limits = Limits.measured(device, dtype, arguments.clock)
    print(limits)
    backbone = janus(arguments.width, arguments.layers, arguments.side, arguments.head, device=device, dtype=dtype)
    for scale in (5.0, 1.0):
        sides = [partial(side, backbone, group, scale) for side in (ours, theirs)]
        worst = difference(backbone, sides[0](), scale)  # warms up both sides
        fast, slow, *_ = measuring.compare(*sides, arguments.repeats, arguments.clock, warm=True)
        print(f"CFG {scale:g}: {group / fast:.3g} images/s, largest difference of log-probs {worst:.1e}")
        if worst > TOLERANCE[dtype]:
            raise SystemExit("the sides do not sample from the same distribution")
        part = least_seconds(backbone, group * (2 if scale > 1 else 1), limits) / fast
        target = TARGETS[device][scale]
        row = Row("rollout, tokens", f"CFG {scale:g}, G = {group}", slow / fast, target, fast, slow, part)
        measuring.report([row], arguments.out)


if __name__ == "__main__":
    main()
