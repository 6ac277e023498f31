"""Layout of a pass, and who sees whom."""

import sys
import types

import pytest
import torch

from unified_rl.backbones.bagel.attention import Attention, checked_attention, flash_plan, visibility
from unified_rl.backbones.bagel.context import Context
from unified_rl.backbones.bagel.sequence import (
    Latent,
    Picture,
    SpecialTokens,
    Text,
    pack,
    patchify,
    unpatchify,
)
from unified_rl.backbones.base import BackboneError

SPECIAL = SpecialTokens(1, 2, 3, 4)


def latent(rows, columns, noisy=False):
    return Latent(torch.zeros(rows * columns, 64), rows, columns, 0.5, noisy)


def test_patches_go_row_by_row_and_inside_row_column_channel():
    image = torch.arange(2 * 4 * 6.0).reshape(2, 4, 6)  # value = 24 channel + 6 row + column
    tokens = patchify(image, 2)
    assert tokens.shape == (6, 8)
    assert tokens[0].tolist() == [0, 24, 1, 25, 6, 30, 7, 31]
    assert tokens[1, 0] == 2  # next token to the right
    assert tokens[3, 0] == 12  # first of the second row of tokens
    batch = torch.randn(3, 2, 4, 6)
    assert torch.equal(unpatchify(patchify(batch, 2), 2, 3, 2), batch)


def test_positions_segments_and_routing_by_hand(config):
    rows = [[Text([1, 9, 2]), Picture(torch.zeros(3, 14, 28)), latent(1, 2, noisy=True)], [latent(2, 1)]]
    packed = pack(rows, config, SPECIAL, torch.tensor([5, 0]))
    assert packed.positions.tolist() == [[5, 6, 7, 8, 8, 8, 8, 9, 9, 9, 9], [0] * 11]
    assert packed.segments.tolist() == [[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [0, 0, 0, 0, *[-1] * 7]]
    assert packed.causal[0].tolist() == [True] * 3 + [False] * 8
    assert packed.noisy[0].tolist() == [False] * 7 + [True] * 4
    assert packed.next_position.tolist() == [9, 1]  # after the noisy latent as if it were not there
    assert packed.understanding_slots.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 14]
    assert packed.generation_slots.tolist() == [8, 9, 12, 13]
    assert packed.ids.tolist() == [1, 9, 2, 3, 4, 3, 4, 3, 4]
    # Nine tokens from the embedding table, then the two patches: text, <3>, patches, <4>, <3>, <4>, <3>, <4>.
    assert packed.understanding_order.tolist() == [0, 1, 2, 3, 9, 10, 4, 5, 6, 7, 8]
    assert packed.latent_positions.tolist() == [0, 1, 0, 8]
    assert packed.patch_positions.tolist() == [[0, 1]]


def test_noise_and_clock_can_be_exchanged(config):
    packed = pack([[latent(1, 2, noisy=True)]], config, SPECIAL)
    x = torch.ones(1, 2, 64)
    moved = packed.at(x, torch.tensor(0.25))
    assert torch.equal(moved.latents, x[0])
    assert moved.times.tolist() == [0.25, 0.25]
    assert packed.times.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("segment", "said"),
    [
        (Picture(torch.zeros(3, 14, 20)), "row 1: a picture of 14 x 20 pixels; sides must be multiples of 14"),
        (Picture(torch.zeros(3, 154, 14)), "up to 140"),
        (latent(9, 1), "row 1: 9 x 1 latent tokens; at most 8"),
        (Latent(torch.zeros(3, 64), 2, 2), r"row 1: latent tokens of shape \[3, 64\], expected \[4, 64\]"),
    ],
)
def test_images_that_do_not_fit_are_refused(config, segment, said):
    with pytest.raises(BackboneError, match=said):
        pack([[Text([1])], [segment]], config, SPECIAL)


def test_special_tokens_come_from_the_vocabulary():
    vocabulary = {"<|im_start|>": 1, "<|im_end|>": 2, "<|vision_start|>": 3, "<|vision_end|>": 4, "a": 5}
    assert SpecialTokens.of(vocabulary) == SPECIAL
    assert SPECIAL.wrap([7, 8]) == [1, 7, 8, 2]
    del vocabulary["<|vision_end|>"]
    with pytest.raises(BackboneError, match=r"has no <\|vision_end\|>"):
        SpecialTokens.of(vocabulary)


def test_rows_must_be_those_of_the_context(model, config):
    with pytest.raises(BackboneError, match="2 rows behind a context of 1"):
        model(pack([[Text([1])]] * 2, config, SPECIAL), Context.empty(1))


def test_a_batch_of_nothing_is_refused(config):
    with pytest.raises(BackboneError, match="every row is empty"):
        pack([[], []], config, SPECIAL)


# ---- visibility ---------------------------------------------------------------------------------------------------


def test_visibility_by_hand():
    """Two text tokens, two noisy ones, one text token, padding; behind a context whose second column is padding."""
    segments = torch.tensor([[0, 0, 1, 1, 2, -1]])
    causal = torch.tensor([[True, True, False, False, True, False]])
    noisy = segments == 1
    mask = visibility(segments, causal, noisy, torch.tensor([[True, False]]))
    assert mask.int().tolist() == [
        [
            [
                [1, 0, 1, 0, 0, 0, 0, 0],
                [1, 0, 1, 1, 0, 0, 0, 0],
                [1, 0, 1, 1, 1, 1, 0, 0],
                [1, 0, 1, 1, 1, 1, 0, 0],
                [1, 0, 1, 1, 0, 0, 1, 0],
                [1, 0, 0, 0, 0, 0, 0, 1],
            ]
        ]
    ]


@pytest.mark.parametrize(
    ("rows", "context", "masked", "triangular"),
    [
        ([[Text([1, 2, 3])]] * 2, 0, False, True),  # a first text
        ([[latent(1, 2)]] * 2, 3, False, False),  # an image behind a context
        ([[Text([1])]] * 2, 3, False, False),  # one token of an answer
        ([[Text([1, 2])]] * 2, 3, True, False),  # a text behind a context
        ([[Text([1, 2])], [Text([1])]], 0, True, False),  # padding
        ([[Text([1]), latent(1, 2)]], 0, True, False),  # two segments
    ],
)
def test_a_mask_is_built_only_where_one_is_needed(config, rows, context, masked, triangular):
    packed = pack(rows, config, SPECIAL)
    valid = torch.ones(len(rows), context, dtype=torch.bool)
    attention = Attention(packed, valid, "sdpa", torch.device("cpu"))
    assert (attention.mask is not None, attention.triangular) == (masked, triangular)


def reference_varlen(queries, keys, values, query_ends, key_ends, longest_query, longest_key, causal):
    """What flash_attn_varlen_func computes: segments laid end to end, the causal triangle aligned at the end."""
    assert queries.ndim == 3
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert query_ends.diff().max() == longest_query
    assert key_ends.diff().max() == longest_key
    out = []
    for i in range(len(query_ends) - 1):
        q = queries[query_ends[i] : query_ends[i + 1]]
        k, v = (x[key_ends[i] : key_ends[i + 1]].repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        if causal:
            hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(out)


@torch.no_grad()
def test_flash_attention_gets_the_same_rule(fresh, monkeypatch):
    """By a stand-in with flash-attention's contract: rows of unlike segments, behind a context with padding."""
    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = reference_varlen
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    noisy = Latent(torch.randn(4, 64), 2, 2, 0.5, True)
    first = [[Text([1, 7, 8, 2])], [Picture(torch.randn(3, 28, 28)), Text([1, 2])], [Text([5])]]
    second = [[noisy], [Text([1, 9, 2]), noisy, Text([6])], [Text([1, 4, 5]), Latent(torch.randn(2, 64), 1, 2)]]
    found = {}
    for fresh.attention in ("sdpa", "flash_attention_2"):
        context, states = Context.empty(3), []
        for rows in (first, second):
            packed = pack(rows, fresh.config, SPECIAL, context.next_position)
            hidden, context = fresh(packed, context)
            states.append(hidden.understanding)
        found[fresh.attention] = torch.cat([*states, hidden.generation])
    assert (found["sdpa"] - found["flash_attention_2"]).abs().max() < 1e-5


def test_flash_groups_leave_padding_out(config):
    packed = pack([[Text([1, 2, 3])], [Text([1])]], config, SPECIAL)
    (group,) = flash_plan(packed, torch.tensor([[True, False], [True, True]]))
    assert group.queries.tolist() == [0, 1, 2, 3]
    assert group.keys.tolist() == [0, 2, 3, 4, 5, 6, 7]
    assert group.query_ends.tolist() == [0, 3, 4]
    assert group.key_ends.tolist() == [0, 4, 7]
    assert group.causal


def test_attention_is_chosen_by_name_or_by_what_runs():
    cpu = torch.device("cpu")
    assert checked_attention("auto", cpu, torch.bfloat16) == "sdpa"
    assert checked_attention("sdpa", torch.device("cuda"), torch.bfloat16) == "sdpa"
    with pytest.raises(BackboneError, match="flash_attention_2 needs a GPU.* on cpu; take auto or sdpa"):
        checked_attention("flash_attention_2", cpu, torch.float32)
    with pytest.raises(BackboneError, match="unknown attention 'eager'"):
        checked_attention("eager", cpu, torch.float32)
