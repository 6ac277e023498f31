"""Batching, contexts and gradients, on the golden file's model."""

import pytest
import torch

from unified_rl.backbones.bagel.config import BagelConfig
from unified_rl.backbones.bagel.context import Context
from unified_rl.backbones.bagel.model import BagelModel
from unified_rl.backbones.bagel.sequence import Latent, Picture, SpecialTokens, Text, pack

SPECIAL = SpecialTokens(1, 2, 3, 4)
CLOSE = 1e-5


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Text(SPECIAL.wrap(torch.randint(5, 300, (count,), generator=generator).tolist()))


def picture(rows, columns, seed=0):
    return Picture(noise(3, 14 * rows, 14 * columns, seed=seed).clamp(-1, 1))


def latent(rows, columns, seed=0, time=0.0, noisy=False):
    return Latent(noise(rows * columns, 64, seed=seed), rows, columns, time, noisy)


def read(model, rows, context=None):
    context = Context.empty(len(rows)) if context is None else context
    packed = pack(rows, model.config, SPECIAL, context.next_position)
    hidden, context = model(packed, context)
    return packed, hidden, context


def row_logits(model, packed, hidden, row):
    """Logits at the understanding tokens of one row."""
    states = packed.in_rows(hidden.understanding)[row]
    taken = packed.in_rows(torch.ones(len(packed.understanding_slots), dtype=torch.bool))[row]
    return model.logits(states[taken])


# Rows of unlike make: order, number, length and size of their segments differ.
ROWS = [
    [text(3), picture(2, 3), text(9, 1)],
    [text(12, 2)],
    [latent(2, 3, 3), text(1, 4), picture(3, 1, 5), picture(1, 1, 6)],
    [picture(4, 4, 7), latent(4, 2, 8), text(2, 9), latent(3, 3, 10, time=0.4, noisy=True)],
]


@torch.no_grad()
def test_padded_batch_equals_rows_alone(model):
    packed, together, context = read(model, ROWS)
    latents = 0
    for row, segments in enumerate(ROWS):
        alone_packed, alone, alone_context = read(model, [segments])
        expected = row_logits(model, alone_packed, alone, 0)
        assert (row_logits(model, packed, together, row) - expected).abs().max() < CLOSE
        if alone.generation is not None:
            part = together.generation[latents : latents + len(alone.generation)]
            assert (part - alone.generation).abs().max() < CLOSE
            latents += len(part)
        assert context.next_position[row] == alone_context.next_position[0]
        assert context.valid[row].sum() == alone_context.valid.sum()


@torch.no_grad()
def test_segments_one_by_one_equal_one_pass(model):
    """Also with rows that have nothing to add, which become padding in the middle of a context."""
    whole_packed, whole, whole_context = read(model, ROWS)
    context, generation = Context.empty(len(ROWS)), [[] for _ in ROWS]
    last = [None] * len(ROWS)
    for number in range(4):
        rows = [segments[number : number + 1] for segments in ROWS]
        packed, hidden, context = read(model, rows, context)
        for row, segments in enumerate(rows):
            if segments:
                last[row] = row_logits(model, packed, hidden, row)
        counts = [sum(len(s.tokens) for s in segments if isinstance(s, Latent)) for segments in rows]
        if hidden.generation is not None:
            for row, part in enumerate(hidden.generation.split(counts)):
                generation[row].append(part)
    joined = torch.cat([part for parts in generation for part in parts])
    assert (joined - whole.generation).abs().max() < CLOSE
    for row, logits in enumerate(last):
        assert (row_logits(model, whole_packed, whole, row)[-len(logits) :] - logits).abs().max() < CLOSE
    assert torch.equal(context.next_position, whole_context.next_position)


@torch.no_grad()
@pytest.mark.parametrize("reserved", [False, True])
def test_samples_share_the_context_of_their_prompt(model, reserved):
    """Velocities of G samples of P prompts behind one context equal passes that read each prompt anew."""
    prompts, samples = [[text(7)], [text(3, 1)]], 3
    _, _, context = read(model, prompts)
    shared = context.take(torch.arange(2).repeat_interleave(samples))
    assert shared.layers is context.layers  # nothing was copied
    layout = [[latent(2, 3, noisy=True)] for _ in range(6)]
    if reserved:
        shared = shared.reserve(8)
    packed = pack(layout, model.config, SPECIAL, shared.next_position)
    for step, time in enumerate((1.0, 0.6)):
        x = noise(6, 6, 64, seed=step)
        found = model.velocity(packed.at(x, torch.tensor(time)), shared).reshape(6, 6, 64)
        for sample in range(6):
            row = [*prompts[sample // samples], Latent(x[sample], 2, 3, time, noisy=True)]
            alone = model.velocity(pack([row], model.config, SPECIAL), Context.empty(1))
            assert (found[sample] - alone).abs().max() < CLOSE


@torch.no_grad()
def test_times_may_differ_between_samples(model):
    packed = pack([[latent(1, 2, noisy=True)], [latent(2, 2, 1, noisy=True)]], model.config, SPECIAL)
    x, times = packed.latents, torch.tensor([0.3, 0.3, 0.8, 0.8, 0.8, 0.8])
    together = model.velocity(packed.at(x, times), Context.empty(2))
    one = model.velocity(pack([[latent(2, 2, 1, 0.8, True)]], model.config, SPECIAL), Context.empty(1))
    assert (together[2:] - one).abs().max() < CLOSE


@torch.no_grad()
def test_writing_token_by_token_equals_teacher_forcing(model):
    """Decoding behind a reserved context, rows ending at different times, in place."""
    prompts = [[picture(2, 2), text(4)], [text(6, 1)]]
    answers = [[1, 50, 60, 70, 2], [1, 80, 2]]
    _, _, context = read(model, prompts)
    packed = pack([[Text(ids)] for ids in answers], model.config, SPECIAL, context.next_position)
    expected = model.text_log_probs(packed, context)
    room = context.reserve(5)
    address = room.layers[0][0].data_ptr()
    for i in range(4):
        rows = [[Text(ids[i : i + 1])] if i < len(ids) else [] for ids in answers]
        step, hidden, room = read(model, rows, room)
        log_probs = model.logits(step.in_rows(hidden.understanding)[:, -1]).log_softmax(-1)
        for row, ids in enumerate(answers):
            if i + 1 < len(ids):
                assert abs(log_probs[row, ids[i + 1]] - expected[row, i]) < CLOSE
    assert room.layers[0][0].data_ptr() == address
    assert expected[1, 2:].tolist() == [0.0, 0.0]
    assert room.next_position.tolist() == (context.next_position + torch.tensor([4, 3])).tolist()


@torch.no_grad()
def test_outside_the_reserved_room_a_context_grows(model):
    _, _, context = read(model, [[text(3)]])
    _, _, grown = read(model, [[text(4, 1)]], context.reserve(2))
    _, _, plain = read(model, [[text(4, 1)]], context)
    assert all(torch.equal(a, b) for a, b in zip(grown.layers[-1], plain.layers[-1], strict=True))


@torch.no_grad()
def test_nobody_sees_a_noisy_latent(model):
    outputs = []
    for seed in (0, 1):
        rows = [[text(2), latent(2, 2, seed, 0.5, True), text(3, 1)]]
        packed, hidden, context = read(model, rows)
        after, later, _ = read(model, [[text(2, 3)]], context)
        outputs.append((row_logits(model, packed, hidden, 0)[-5:], row_logits(model, after, later, 0)))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@torch.no_grad()
def test_text_is_causal_and_images_are_not(model):
    def states(last):
        packed, hidden, _ = read(model, [[Text([1, 9, last])]])
        return packed.in_rows(hidden.understanding)[0]

    assert torch.equal(states(7)[:2], states(8)[:2])
    pixels = noise(3, 28, 28)
    changed = pixels.clone()
    changed[:, 14:, 14:] += 1  # the last patch
    first, second = (read(model, [[Picture(p)]])[1].understanding for p in (pixels, changed))
    assert ((first - second).abs().amax(-1) > 1e-4).all()  # every token, the boundaries included


def test_gradients_reach_both_experts_and_the_prompt(fresh):
    fresh.requires_grad_(True)
    fresh.latent_pos_embed.requires_grad_(False)
    fresh.vit_pos_embed.requires_grad_(False)
    _, _, context = read(fresh, [[picture(2, 2), text(4)]])
    shared = context.take([0, 0])
    packed = pack([[latent(2, 2, noisy=True)]] * 2, fresh.config, SPECIAL, shared.next_position)
    fresh.velocity(packed, shared).pow(2).mean().backward()
    without = {name for name, p in fresh.named_parameters() if p.requires_grad and p.grad is None}
    last = "language_model.model.layers.2."
    # The last layer's states of the prompt are read by nobody: only its keys and values count.
    unread = [f"{last}{part}" for part in ("self_attn.o_proj", "self_attn.q_", "mlp.", "post_attention_layernorm.")]
    zero = {name for name, p in fresh.named_parameters() if p.grad is not None and not p.grad.any()}
    assert without | zero <= {
        name
        for name, _ in fresh.named_parameters()
        if name.startswith((*unread, "language_model.model.norm.", "language_model.lm_head"))
    }
    assert fresh.connector.fc1.weight.grad.abs().max() > 0


def test_a_context_read_without_gradients_keeps_them_out_of_the_prompt(fresh):
    fresh.requires_grad_(True)
    with torch.no_grad():
        _, _, context = read(fresh, [[picture(2, 2)]])
    packed = pack([[latent(2, 2, noisy=True)]], fresh.config, SPECIAL, context.next_position)
    fresh.velocity(packed, context).mean().backward()
    assert fresh.connector.fc1.weight.grad is None
    assert fresh.vae2llm.weight.grad.abs().max() > 0


def test_recomputed_layers_give_the_same_gradients(fresh):
    def gradients():
        fresh.zero_grad()
        _, _, context = read(fresh, [[text(4)]])
        packed = pack([[latent(2, 2, noisy=True)]], fresh.config, SPECIAL, context.next_position)
        fresh.velocity(packed, context).pow(2).mean().backward()
        return {name: p.grad.clone() for name, p in fresh.named_parameters() if p.grad is not None}

    fresh.requires_grad_(True)
    plain = gradients()
    for share in (0.5, 1.0):
        fresh.enable_activation_checkpointing(share)
        recomputed = gradients()
        assert plain.keys() == recomputed.keys()
        assert all((plain[name] - recomputed[name]).abs().max() < 1e-7 for name in plain)


@torch.no_grad()
def test_half_precision_runs_and_stays_near(fresh):
    packed = pack([[text(4), latent(2, 2, time=0.5, noisy=True)]], fresh.config, SPECIAL)
    exact = fresh.velocity(packed, Context.empty(1))
    half = fresh.to(torch.bfloat16).velocity(packed, Context.empty(1))
    assert half.dtype == torch.float32
    assert (half - exact).abs().max() < 0.05 * exact.abs().max()


# ---- the real size ------------------------------------------------------------------------------------------------


def public_shapes():
    """Names and shapes of the published 7B checkpoint, spelt out from its description."""
    d, kv, ff, v, vocabulary = 3584, 512, 18944, 1152, 152064
    shapes = {
        "language_model.model.embed_tokens.weight": (vocabulary, d),
        "language_model.lm_head.weight": (vocabulary, d),
        "language_model.model.norm.weight": (d,),
        "language_model.model.norm_moe_gen.weight": (d,),
        "time_embedder.mlp.0.weight": (d, 256),
        "time_embedder.mlp.0.bias": (d,),
        "time_embedder.mlp.2.weight": (d, d),
        "time_embedder.mlp.2.bias": (d,),
        "vae2llm.weight": (d, 64),
        "vae2llm.bias": (d,),
        "llm2vae.weight": (64, d),
        "llm2vae.bias": (64,),
        "latent_pos_embed.pos_embed": (4096, d),
        "vit_pos_embed.pos_embed": (4900, d),
        "connector.fc1.weight": (d, v),
        "connector.fc1.bias": (d,),
        "connector.fc2.weight": (d, d),
        "connector.fc2.bias": (d,),
    }
    for n in range(28):
        for expert in ("", "_moe_gen"):
            layer = f"language_model.model.layers.{n}."
            for name, rows in (("q", d), ("k", kv), ("v", kv)):
                shapes[f"{layer}self_attn.{name}_proj{expert}.weight"] = (rows, d)
                shapes[f"{layer}self_attn.{name}_proj{expert}.bias"] = (rows,)
            shapes[f"{layer}self_attn.o_proj{expert}.weight"] = (d, d)
            shapes[f"{layer}self_attn.q_norm{expert}.weight"] = (128,)
            shapes[f"{layer}self_attn.k_norm{expert}.weight"] = (128,)
            shapes[f"{layer}mlp{expert}.gate_proj.weight"] = (ff, d)
            shapes[f"{layer}mlp{expert}.up_proj.weight"] = (ff, d)
            shapes[f"{layer}mlp{expert}.down_proj.weight"] = (d, ff)
            shapes[f"{layer}input_layernorm{expert}.weight"] = (d,)
            shapes[f"{layer}post_attention_layernorm{expert}.weight"] = (d,)
    vision = "vit_model.vision_model."
    shapes[f"{vision}embeddings.patch_embedding.weight"] = (v, 588)
    shapes[f"{vision}embeddings.patch_embedding.bias"] = (v,)
    shapes[f"{vision}embeddings.position_embedding.weight"] = (4900, v)
    norms = [f"{vision}post_layernorm"]
    for n in range(26):
        layer = f"{vision}encoder.layers.{n}."
        norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
        sizes = {"mlp.fc1": (4304, v), "mlp.fc2": (v, 4304)}
        sizes |= {f"self_attn.{name}": (v, v) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        for name, size in sizes.items():
            shapes[f"{layer}{name}.weight"], shapes[f"{layer}{name}.bias"] = size, size[:1]
    for name in norms:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (v,)
    return shapes


def test_full_size_has_the_public_names_and_shapes():
    with torch.device("meta"):
        model = BagelModel(BagelConfig())
    parameters = dict(model.named_parameters())
    assert {name: tuple(p.shape) for name, p in parameters.items()} == public_shapes()
    assert len(parameters) == 1223
    assert round(sum(p.numel() for p in parameters.values()) / 1e9, 3) == 14.607
    assert not list(model.buffers())
