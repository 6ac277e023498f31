"""The contract of a backbone, on a tiny Janus with random weights."""

import numpy as np
import pytest
import torch
import transformers
from transformers import JanusProcessor

from unified_rl.backbones.base import BackboneError, Sampling, TokenTraj
from unified_rl.backbones.janus import JanusBackbone
from unified_rl.backbones.janus_sampling import packed_linears

PROMPTS = ["a red circle", "two blue squares and a green ring", "a cross"]
PLAIN, GUIDED = Sampling(), Sampling(temperature=0.9, guidance_scale=3.0)
BOTH = pytest.mark.parametrize("sampling", [PLAIN, GUIDED], ids=["plain", "guided"])


@pytest.fixture(scope="module")
def janus(random_janus_folder):
    return JanusBackbone.from_pretrained(random_janus_folder)


@pytest.fixture
def fresh(random_janus_folder):
    return JanusBackbone.from_pretrained(random_janus_folder)


def pictures(count, side=32, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def drawn(actions):
    """Given tokens as images of unknown probability."""
    return TokenTraj(actions, torch.zeros(actions.shape))


def repeated(prompts, times):
    return [p for p in prompts for _ in range(times)]


class LanguageModelCalls:
    """Batch sizes of the language model's forwards."""

    def __init__(self, backbone):
        self.batches = []
        self.handle = backbone.model.model.language_model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        self.batches.append(len(kwargs["inputs_embeds"]))

    def __enter__(self):
        return self.batches

    def __exit__(self, *unused):
        self.handle.remove()


# ---- drawing ------------------------------------------------------------------------------------------------------


@BOTH
def test_replay_ratio_is_one(janus, sampling):
    trajectory = janus.rollout_images(PROMPTS, list(range(12)), sampling)
    new = janus.image_dist(repeated(PROMPTS, 4), trajectory, sampling).log_prob(trajectory.actions)
    assert trajectory.actions.shape == trajectory.log_probs.shape == (12, 16)
    assert trajectory.log_probs.dtype == torch.float32
    assert (new - trajectory.log_probs).exp().sub(1).abs().max() <= 1e-4
    assert trajectory.log_probs.std() > 0.5  # the distributions are not all alike, or this would prove nothing


@BOTH
def test_tokens_depend_on_prompt_and_seed_only(janus, sampling):
    whole = janus.rollout_images(PROMPTS, list(range(12)), sampling)
    alone = janus.rollout_images([PROMPTS[2]], [9], sampling)
    assert torch.equal(alone.actions[0], whole.actions[9])
    assert torch.allclose(alone.log_probs[0], whole.log_probs[9], atol=1e-4)
    mixed = janus.rollout_images([PROMPTS[1], PROMPTS[0]], [6, 4, 1, 3], sampling)
    assert torch.equal(mixed.actions, whole.actions[[6, 4, 1, 3]])
    assert len({tuple(row) for row in whole.actions.tolist()}) == 12


@BOTH
def test_prefill_sharing_changes_nothing(janus, sampling):
    shared = janus.rollout_images(PROMPTS, list(range(9)), sampling)
    single = janus.rollout_images(repeated(PROMPTS, 3), list(range(9)), sampling)
    assert torch.equal(shared.actions, single.actions)
    assert torch.allclose(shared.log_probs, single.log_probs, atol=1e-5)


def test_prompt_is_run_once_per_group_and_no_unconditional_branch_at_scale_one(janus):
    with LanguageModelCalls(janus) as batches:
        janus.rollout_images(PROMPTS, list(range(12)), PLAIN)
    assert batches == [3] + [12] * 15
    with LanguageModelCalls(janus) as batches:
        janus.rollout_images(PROMPTS, list(range(12)), GUIDED)
    assert batches == [6] + [24] * 15
    actions = torch.zeros(3, 16, dtype=torch.long)
    with LanguageModelCalls(janus) as batches:
        janus.image_dist(PROMPTS, drawn(actions), PLAIN)
        janus.image_dist(PROMPTS, drawn(actions), GUIDED)
    assert batches == [3, 6]


def test_rollout_frequencies_are_the_replayed_distribution(janus):
    """Chi-square of the first token over 2000 seeds, through the whole sampling path."""
    draws = 2000
    first = janus.rollout_images([PROMPTS[0]], list(range(draws)), PLAIN).actions[:, 0]
    logits = janus.image_dist([PROMPTS[0]], drawn(torch.zeros(1, 16, dtype=torch.long)), PLAIN, steps=[0]).logits[0, 0]
    expected = logits.double().softmax(-1) * draws
    order = expected.argsort(descending=True)
    seen, expected = first.bincount(minlength=len(expected))[order], expected[order]
    common = int((expected >= 5).sum())
    seen = torch.cat([seen[:common], seen[common:].sum(0, keepdim=True)])
    expected = torch.cat([expected[:common], expected[common:].sum(0, keepdim=True)])
    statistic = ((seen - expected) ** 2 / expected.clamp_min(1e-9)).sum().item()
    assert common > 5
    assert statistic < common + 5 * (2 * common) ** 0.5


def test_cold_sampling_is_transformers_greedy_guided_generation(janus):
    """The unconditional branch and the combination are those of the public model's own code."""
    processor = janus.processor
    texts = [f"<|User|>: {p}\n\n<|Assistant|>:" for p in PROMPTS]
    inputs = processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")
    expected = janus.model.generate(**inputs, generation_mode="image", guidance_scale=3.0, do_sample=False)
    cold = janus.rollout_images(PROMPTS, [0, 0, 0], Sampling(temperature=1e-5, guidance_scale=3.0))
    assert torch.equal(cold.actions, expected)


@BOTH
def test_subset_of_steps_equals_full(janus, sampling):
    actions = janus.rollout_images(PROMPTS, [1, 2, 3], sampling).actions
    full = janus.image_dist(PROMPTS, drawn(actions), sampling).logits
    for steps in ([0], [3, 7, 15], [9, 2]):
        part = janus.image_dist(PROMPTS, drawn(actions), sampling, steps=steps).logits
        assert torch.allclose(part, full[:, steps], atol=1e-5)


def test_kl_to_itself_is_zero_and_to_another_is_not(janus):
    actions = janus.rollout_images(PROMPTS, [1, 2, 3], PLAIN).actions
    one, again = janus.image_dist(PROMPTS, drawn(actions), PLAIN), janus.image_dist(PROMPTS, drawn(actions), PLAIN)
    assert (one.kl(again) == 0).all()
    assert (janus.image_dist(PROMPTS[1:] + PROMPTS[:1], drawn(actions), PLAIN).kl(one) > 0).all()


def test_padding_of_other_prompts_does_not_matter(janus):
    actions = janus.rollout_images(PROMPTS, [1, 2, 3], PLAIN).actions
    together = janus.image_dist(PROMPTS, drawn(actions), PLAIN).logits
    for row, prompt in enumerate(PROMPTS):
        alone = janus.image_dist([prompt], drawn(actions[row : row + 1]), PLAIN).logits[0]
        assert torch.allclose(together[row], alone, atol=1e-4)


def test_dropped_prompts_are_the_unconditional_branch(janus):
    actions = janus.rollout_images(PROMPTS, [1, 2, 3], PLAIN).actions
    conditional = janus.image_dist(PROMPTS, drawn(actions), PLAIN).logits
    dropped = janus.image_dist(PROMPTS, drawn(actions), PLAIN, dropped=[False, True, True]).logits
    guided = janus.image_dist(PROMPTS, drawn(actions), Sampling(guidance_scale=3.0)).logits
    assert torch.allclose(dropped[0], conditional[0], atol=1e-5)
    combined = dropped + 3.0 * (conditional - dropped)
    assert torch.allclose(combined[1:], guided[1:], atol=1e-4)


def test_actions_and_seeds_that_do_not_fit_are_refused(janus):
    with pytest.raises(BackboneError, match="7 seeds"):
        janus.rollout_images(PROMPTS, list(range(7)), PLAIN)
    with pytest.raises(BackboneError, match=r"\[3, 15\]"):
        janus.image_dist(PROMPTS, drawn(torch.zeros(3, 15, dtype=torch.long)), PLAIN)


# ---- image tokenizer ----------------------------------------------------------------------------------------------


def test_decode_is_the_models_own_decoder_as_bytes(janus):
    actions = janus.rollout_images(PROMPTS, list(range(36)), PLAIN).actions  # more than one part
    images = janus.decode(drawn(actions))
    with torch.no_grad():
        pixels = janus.model.decode_image_tokens(actions)
    assert images.dtype == np.uint8
    assert images.shape == (36, 32, 32, 3)
    inside = pixels.clamp(-1, 1)
    assert np.abs(images / 127.5 - 1 - inside.numpy()).max() <= 0.5 / 127.5 + 1e-3


# ---- chat format --------------------------------------------------------------------------------------------------


def test_drawing_prompt_is_the_chat_format_with_one_bos_and_an_open_image(janus):
    ids, mask = janus.inputs.drawing(PROMPTS)
    tokenizer = janus.tokenizer
    assert (ids == tokenizer.bos_token_id).sum(1).tolist() == [1, 1, 1]
    assert (ids[:, -1] == tokenizer.boi_token_id).all()
    assert torch.equal(mask, (ids != tokenizer.pad_token_id).long())
    assert mask[0, 0] == 0  # padded on the left
    shown = tokenizer.decode(ids[0][mask[0] == 1])
    assert shown == "<｜begin▁of▁sentence｜><|User|>: a red circle\n\n<|Assistant|>:<begin_of_image>"


def test_reading_prompt_has_the_image_before_the_question(janus):
    ids, mask, pixels = janus.inputs.reading([pictures(1)[0], None], ["what?", "why is that?"])
    shown = [janus.tokenizer.decode(row[keep == 1]) for row, keep in zip(ids, mask, strict=True)]
    picture = "<begin_of_image>" + "<image_placeholder>" * 16 + "<end_of_image>"
    assert shown[0] == f"<｜begin▁of▁sentence｜><|User|>: {picture}\nwhat?\n\n<|Assistant|>:"
    assert shown[1] == "<｜begin▁of▁sentence｜><|User|>: why is that?\n\n<|Assistant|>:"
    assert pixels.shape == (1, 3, 32, 32)


def test_bos_is_not_doubled_by_a_template_that_writes_it(fresh):
    ids, _ = fresh.inputs.drawing(PROMPTS)
    fresh.processor.chat_template = "{{ bos_token }}" + fresh.processor.chat_template
    assert torch.equal(fresh.inputs.drawing(PROMPTS)[0], ids)


def test_answers_begin_as_the_chat_template_writes_them(janus):
    whole = "<|User|>: Q\n\n<|Assistant|>: a red circle"
    expected = janus.tokenizer(whole)["input_ids"]
    question, _, _ = janus.inputs.reading([None], ["Q"])
    answer, mask = janus.inputs.responses(["a red circle"], end_of_turn=False)
    assert question[0].tolist() + answer[0].tolist() == expected
    ended, _ = janus.inputs.responses(["a red circle", ""], end_of_turn=True)
    assert ended[0].tolist() == [*answer[0].tolist(), janus.tokenizer.eos_token_id]
    assert ended[1, 0] == janus.tokenizer.eos_token_id


@pytest.mark.parametrize("text", ["a <image_placeholder>", "x<begin_of_image>", "<｜end▁of▁sentence｜>"])
def test_control_tokens_in_text_are_refused(janus, text):
    with pytest.raises(BackboneError, match="control token"):
        janus.rollout_images([text], [0], PLAIN)
    with pytest.raises(BackboneError, match="control token"):
        janus.text_logps([pictures(1)[0]], [text], ["yes"])
    with pytest.raises(BackboneError, match="control token"):
        janus.text_logps([pictures(1)[0]], ["what?"], [text])


def test_pictures_of_another_kind_are_refused(janus):
    with pytest.raises(BackboneError, match="image 1"):
        janus.text_logps([pictures(1)[0], np.zeros((32, 32), np.uint8)], ["a", "b"], ["c", "d"])


# ---- reading ------------------------------------------------------------------------------------------------------


def loop_log_probs(backbone, image, question, answer):
    """One forward per token of `answer`, through transformers' own forward and the processor's own text handling."""
    picture = "<image_placeholder>\n" if image is not None else ""
    start = f"<|User|>: {picture}{question}\n\n<|Assistant|>:"
    batch = backbone.processor(text=[start], images=None if image is None else [image], return_tensors="pt")
    ids = batch.pop("input_ids")
    batch.pop("attention_mask")
    result = []
    for token in backbone.tokenizer(" " + answer, add_special_tokens=False)["input_ids"]:
        logits = backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids), **batch).logits[0, -1]
        result.append(logits.log_softmax(-1)[token].item())
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return result


@torch.no_grad()
def test_text_log_probs_equal_a_token_by_token_loop_whatever_the_padding(janus):
    images = [*pictures(2), pictures(1, side=50, seed=4)[0], None]
    questions = ["what is it?", "describe the image in detail", "is there a red circle in it?", "hm?"]
    answers = ["a red circle", "two green squares and a blue cross", "no", "yes"]
    score = janus.text_logps(images, questions, answers)
    assert score.log_probs.dtype == torch.float32
    for row, arguments in enumerate(zip(images, questions, answers, strict=True)):
        kept = score.log_probs[row][score.mask[row] == 1]
        assert torch.allclose(kept, torch.tensor(loop_log_probs(janus, *arguments)), atol=1e-5)
        alone = janus.text_logps(*([value] for value in arguments))
        assert torch.allclose(alone.log_probs[0], kept, atol=1e-5)
    assert (score.log_probs[score.mask == 0] == 0).all()
    assert score.log_probs[score.mask == 1].std() > 0.5


def test_text_log_probs_are_differentiable(fresh):
    weight = fresh.model.model.aligner.fc1.weight.requires_grad_(True)
    fresh.text_logps(pictures(2), ["what?"] * 2, ["a ring", "yes"], end_of_turn=True).mean_log_prob().sum().backward()
    assert weight.grad.abs().sum() > 0


def test_greedy_text_is_transformers_generation(janus):
    images, questions = pictures(3), ["what?", "is there a red circle?", "describe the image"]
    trajectory = janus.rollout_text(images, questions, [0, 0, 0], 8, 0.0)
    texts = [f"<|User|>: <image_placeholder>\n{q}\n\n<|Assistant|>:" for q in questions]
    inputs = janus.processor(text=texts, images=images, padding=True, return_tensors="pt")
    out = janus.model.generate(**inputs, generation_mode="text", do_sample=False, max_new_tokens=8)
    assert torch.equal(trajectory.ids, out[:, inputs["input_ids"].shape[1] :])
    assert trajectory.texts == [t.removeprefix(" ") for t in janus.tokenizer.batch_decode(trajectory.ids, True)]


def test_sampled_text_belongs_to_its_seed_and_replays(janus):
    images, questions = pictures(3), ["what?", "is there a red circle?", "describe the image"]
    whole = janus.rollout_text(images, questions, [4, 5, 6], 10, 0.8)
    alone = janus.rollout_text(images[1:2], questions[1:2], [5], 10, 0.8)
    length = int(alone.mask.sum())
    assert torch.equal(alone.ids[0, :length], whole.ids[1, :length])
    assert torch.allclose(alone.log_probs[0, :length], whole.log_probs[1, :length], atol=1e-4)
    assert (whole.entropies[whole.mask == 1] > 0).all()
    assert janus.rollout_text(images, questions, [7, 8, 9], 10, 0.8).ids.tolist() != whole.ids.tolist()


def test_text_stops_at_the_end_of_turn(fresh):
    """With the end token made likely, some answers end early: padding and zeros behind it, the token itself counted."""
    end = fresh.tokenizer.eos_token_id
    fresh.model.lm_head.weight.data[end] = fresh.model.lm_head.weight.data.norm(dim=1).max() * 0.2
    trajectory = fresh.rollout_text(pictures(16), ["what?"] * 16, list(range(16)), 12, 1.0)
    lengths = trajectory.mask.sum(1).int().tolist()
    assert len(set(lengths)) > 1
    for ids, mask, length in zip(trajectory.ids, trajectory.mask, lengths, strict=True):
        assert (ids[:length] == end).sum() == (1 if length < len(ids) else int(ids[-1] == end))
        assert (ids[length:] == fresh.tokenizer.pad_token_id).all()
        assert mask.tolist() == [1.0] * length + [0.0] * (len(ids) - length)
    assert (trajectory.log_probs[trajectory.mask == 0] == 0).all()


# ---- loading ------------------------------------------------------------------------------------------------------


def test_names_are_those_of_the_public_class(janus, random_janus_folder):
    public = transformers.JanusForConditionalGeneration.from_pretrained(random_janus_folder)
    assert list(janus.model.state_dict()) == list(public.state_dict())
    assert {
        "lm_head.weight",
        "model.language_model.layers.0.self_attn.q_proj.weight",
        "model.generation_embeddings.weight",
        "model.generation_head.vision_head.weight",
        "model.vqmodel.quantize.embedding.weight",
    } <= set(janus.model.state_dict())


def test_half_precision_keeps_the_image_tokenizer_in_fp32(random_janus_folder, janus, tmp_path):
    half = JanusBackbone.from_pretrained(random_janus_folder, dtype=torch.bfloat16)
    kinds = {n.split(".")[1]: p.dtype for n, p in half.model.named_parameters() if n.startswith("model.")}
    assert kinds.pop("vqmodel") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
    trajectory = half.rollout_images(PROMPTS, list(range(6)), GUIDED)
    assert trajectory.log_probs.dtype == torch.float32
    assert np.array_equal(half.decode(trajectory), janus.decode(trajectory))
    distribution = half.image_dist(repeated(PROMPTS, 2), trajectory, GUIDED)
    assert distribution.logits.dtype == torch.float32
    assert half.text_logps(pictures(1), ["what?"], ["yes"]).log_probs.dtype == torch.float32
    half.model.save_pretrained(tmp_path)
    assert '"JanusForConditionalGeneration"' in (tmp_path / "config.json").read_text()


def test_everything_is_in_eval_mode_without_gradients(janus):
    assert not any(module.training for module in janus.model.modules())
    assert not any(parameter.requires_grad for parameter in janus.model.parameters())
    assert isinstance(janus.processor, JanusProcessor)


def test_wrong_folders_are_named(tmp_path, random_janus_folder):
    with pytest.raises(BackboneError, match="no config.json"):
        JanusBackbone.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "multi_modality"}')
    with pytest.raises(BackboneError, match="deepseek-community"):
        JanusBackbone.from_pretrained(tmp_path)


def test_packed_linears_give_the_same_and_are_gone_afterwards(janus):
    heads = janus.model.model.generation_head
    states = torch.randn(8, heads.proj_out.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = heads(states)
        with pytest.raises(KeyError), packed_linears([heads], 8):
            assert "forward" in vars(heads.vision_head)
            torch.testing.assert_close(heads(states), expected, atol=1e-5, rtol=1e-5)
            raise KeyError
        assert torch.equal(heads(states), expected)
    assert "forward" not in vars(heads.vision_head)


def test_packed_linears_that_read_the_same_states_are_one_product(janus):
    layer = janus.model.model.language_model.layers[0]
    parts = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
    states = torch.randn(4, 1, parts[0].in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = [part(states) for part in parts]
        fed = layer.mlp(states)
        with packed_linears([layer], 4):
            found = [part(states) for part in parts]
            assert all(part._base is found[0]._base is not None for part in found)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(layer.mlp(states), fed, atol=1e-5, rtol=1e-5)
