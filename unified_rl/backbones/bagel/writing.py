"""Text behind a context: sampled a token at a time with per-sample seeds, and scored by teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from unified_rl.backbones.bagel.context import Context
from unified_rl.backbones.bagel.model import BagelModel
from unified_rl.backbones.bagel.sequence import PADDING, Segment, SpecialTokens, Text, pack
from unified_rl.backbones.base import TextScore, sampled_text


def score_text(
    model: BagelModel, special: SpecialTokens, context: Context, answers: Sequence[Sequence[int]], device: torch.device
) -> TextScore:
    """Log-probs of ids after the token that opens an answer, differentiable."""
    width = max([1, *map(len, answers)])
    rows = [[Text([special.text_start, *ids])] for ids in answers]
    log_probs = model.text_log_probs(pack(rows, model.config, special, context.next_position).to(device), context)
    log_probs = F.pad(log_probs, (0, width - log_probs.shape[1]))  # where all answers are empty
    ids = torch.tensor([[*ids, *[special.text_end] * (width - len(ids))] for ids in answers], device=device)
    lengths = torch.tensor([len(ids) for ids in answers], device=device)
    mask = (torch.arange(width, device=device) < lengths[:, None]).float()
    return TextScore(log_probs, mask, ids)


def answer_logits(
    model: BagelModel,
    special: SpecialTokens,
    rows: Sequence[Sequence[Segment]],
    ids: torch.Tensor,
    mask: torch.Tensor,
    device: torch.device,
) -> torch.Tensor:
    """fp32 [B, T, V] logits that predict the tokens ids [B, T] behind what the rows read, in one pass of the model.

    Args:
        mask: [B, T], 1 at tokens, with padding on the right.
    """
    lengths = mask.sum(1).long().cpu()
    answers = [row[:length] for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
    opened = [[*row, Text([special.text_start, *answer[:-1]])] for row, answer in zip(rows, answers, strict=True)]
    packed = pack(opened, model.config, special)
    whole = (packed.segments != PADDING).sum(1)
    # The last states of a row predict its tokens; a padded place takes any.
    places = (whole - lengths.clamp_min(1))[:, None] + torch.arange(ids.shape[1])
    places = places.minimum(whole[:, None] - 1).to(device)
    packed = packed.to(device)
    states = packed.in_rows(model(packed, Context.empty(len(rows)))[0].understanding)
    states = states.gather(1, places[..., None].expand(-1, -1, states.shape[2]))
    return model.logits(states).float()


@torch.no_grad()
def sample_text(
    model: BagelModel,
    special: SpecialTokens,
    context: Context,
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    device: torch.device,
    top_p: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write behind every row of a context until the text's end or `max_new_tokens`.

    Arguments and results as for `base.sampled_text`.
    """
    context = context.reserve(max_new_tokens)
    layout = pack([[Text([special.text_start])]], model.config, special).to(device).tiled(context.next_position)

    def next_logits(token: torch.Tensor | None) -> torch.Tensor:
        nonlocal context, layout
        layout = layout if token is None else layout.following(token)
        hidden, context = model(layout, context)
        return model.logits(hidden.understanding)

    end = special.text_end
    return sampled_text(next_logits, seeds, max_new_tokens, temperature, top_p, end, end, device)
