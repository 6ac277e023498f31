"""Who sees whom, and attention by that rule: SDPA everywhere, flash-attention's variable lengths on request."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from unified_rl.backbones import base
from unified_rl.backbones.bagel.sequence import PADDING, Packed
from unified_rl.backbones.base import BackboneError, flash_attention_runs

IMPLEMENTATIONS = ("sdpa", "flash_attention_2")


class Attention:
    """Attention of one pass, the same in every layer.

    Args:
        packed: the pass.
        context_valid: bool [B, C], on the CPU, the columns of the context that may be seen.
        implementation: one of IMPLEMENTATIONS.
        device: of the queries.
    """

    def __init__(self, packed: Packed, context_valid: torch.Tensor, implementation: str, device: torch.device) -> None:
        self.columns = context_valid.shape[1] + packed.segments.shape[1]
        self.plan = self.mask = None
        self.triangular = False
        if implementation == "flash_attention_2":
            self.plan = [group.to(device) for group in flash_plan(packed, context_valid)]
            return
        if implementation != "sdpa":
            raise BackboneError(f"unknown attention {implementation!r}: {' or '.join(IMPLEMENTATIONS)}")
        plain = bool((packed.segments == 0).all()) and bool(context_valid.all())  # one segment a row, no padding
        one_token = packed.segments.shape[1] == 1
        self.triangular = plain and bool(packed.causal.all()) and not context_valid.shape[1] and not one_token
        if not (self.triangular or (plain and (one_token or not packed.causal.any()))):
            self.mask = visibility(
                packed.segments.to(device), packed.causal.to(device), packed.noisy.to(device), context_valid.to(device)
            )

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """[B, L, heads, size] of queries of that shape and keys and values [B, >= C + L, kv heads, size]."""
        keys, values = keys[:, : self.columns], values[:, : self.columns]
        if self.plan is not None:
            return _flash(self.plan, queries, keys, values)
        if self.mask is not None:
            # The memory-efficient kernel, the only one that takes a mask on a GPU, does not share heads; without it
            # the whole matrix of scores would be stored.
            share = queries.shape[2] // keys.shape[2]
            keys, values = (x.repeat_interleave(share, 2) for x in (keys, values))
        queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=self.mask, is_causal=self.triangular, enable_gqa=self.mask is None
        )
        return mixed.transpose(1, 2)


def visibility(
    segments: torch.Tensor, causal: torch.Tensor, noisy: torch.Tensor, context_valid: torch.Tensor
) -> torch.Tensor:
    """bool [B, 1, L, C + L], true where a query sees a key.

    Args:
        segments, causal, noisy: [B, L], see `Packed`.
        context_valid: bool [B, C].
    """
    length = segments.shape[1]
    order = torch.arange(length, device=segments.device)
    of_query, of_key = segments[:, :, None], segments[:, None, :]
    earlier = (of_key < of_query) & ~noisy[:, None, :]
    same = (of_key == of_query) & (~causal[:, :, None] | (order <= order[:, None]))
    seen = (of_key != PADDING) & (earlier | same)
    # A padded query sees itself: a row of nothing but padding would have no softmax.
    seen = seen | torch.eye(length, dtype=torch.bool, device=segments.device)
    return torch.cat([context_valid[:, None].expand(-1, length, -1), seen], 2)[:, None]


@dataclass(frozen=True)
class FlashGroup:
    """Segments that one call of flash-attention computes, laid end to end.

    Attributes:
        queries, keys: int64 places in the flattened [B * L] and [B * (C + L)].
        query_ends, key_ends: int32 [segments + 1] cumulative lengths, from 0.
        longest_query, longest_key: lengths.
        causal: the last query sees the last key, the one before it all but the last, and so on.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    query_ends: torch.Tensor
    key_ends: torch.Tensor
    longest_query: int
    longest_key: int
    causal: bool

    def to(self, device: torch.device) -> FlashGroup:
        """With its tensors on `device`."""
        tensors = (x.to(device) for x in (self.queries, self.keys, self.query_ends, self.key_ends))
        return FlashGroup(*tensors, self.longest_query, self.longest_key, self.causal)


def flash_plan(packed: Packed, context_valid: torch.Tensor) -> list[FlashGroup]:
    """One group for every number of segment in a row, and for causal ones and others; on the CPU.

    A segment's keys end with its own, so that flash-attention's causal rule, aligned at the end, is BAGEL's.
    """
    batch, length = packed.segments.shape
    columns = context_valid.shape[1] + length
    groups = []
    for number in range(int(packed.segments.max()) + 1):
        for causal in (True, False):
            queries, keys = [], []
            for row in range(batch):
                own = (packed.segments[row] == number) & (packed.causal[row] == causal)
                if not own.any():
                    continue
                earlier = (packed.segments[row] != PADDING) & (packed.segments[row] < number) & ~packed.noisy[row]
                queries.append(row * length + own.nonzero()[:, 0])
                keys.append(row * columns + torch.cat([context_valid[row], earlier | own]).nonzero()[:, 0])
            if queries:
                groups.append(_group(queries, keys, causal))
    return groups


def _group(queries: list[torch.Tensor], keys: list[torch.Tensor], causal: bool) -> FlashGroup:
    ends = [torch.tensor([0, *map(len, part)]).cumsum(0).int() for part in (queries, keys)]
    longest = [max(map(len, part)) for part in (queries, keys)]
    return FlashGroup(torch.cat(queries), torch.cat(keys), *ends, *longest, causal)


def _flash(plan: list[FlashGroup], queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention by `plan`; padded queries get zeros."""
    from flash_attn import flash_attn_varlen_func  # an optional package

    flat_queries, flat_keys, flat_values = (x.flatten(0, 1) for x in (queries, keys, values))
    mixed = torch.zeros_like(flat_queries)
    for group in plan:
        part = flash_attn_varlen_func(
            flat_queries[group.queries],
            flat_keys[group.keys],
            flat_values[group.keys],
            group.query_ends,
            group.key_ends,
            group.longest_query,
            group.longest_key,
            causal=group.causal,
        )
        mixed = mixed.index_copy(0, group.queries, part)
    return mixed.unflatten(0, queries.shape[:2])


def checked_attention(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """`base.choose_attention` among what this attention can do.

    Raises:
        BackboneError: unknown, or flash-attention where it cannot run.
    """
    if requested not in ("auto", *IMPLEMENTATIONS):
        raise BackboneError(f"unknown attention {requested!r}: auto, {' or '.join(IMPLEMENTATIONS)}")
    if requested == "flash_attention_2" and not flash_attention_runs(device, dtype):
        raise BackboneError(
            f"flash_attention_2 needs a GPU, bfloat16 or float16 and the package flash-attn, but this is {dtype} on"
            f" {device}; take auto or sdpa"
        )
    return base.choose_attention(requested, device, dtype)
