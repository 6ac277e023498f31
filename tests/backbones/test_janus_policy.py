"""What of a Janus is trained, and how it is stored."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from unified_rl.backbones.base import BackboneError, Sampling, TokenTraj
from unified_rl.backbones.janus import JanusBackbone
from unified_rl.memory import peak_bytes

PROMPTS = ["a red circle", "two blue squares and a green ring"]
GUIDED = Sampling(guidance_scale=3.0)
SCOPES = pytest.mark.parametrize("scope", ["full", "lora"])


def load(folder, scope="full", **kwargs):
    backbone = JanusBackbone.from_pretrained(folder, **kwargs)
    if scope == "lora":
        backbone.add_lora(4, 8)
    return backbone


def drawn(actions):
    """Given tokens as images of unknown probability."""
    return TokenTraj(actions, torch.zeros(actions.shape))


def logits(backbone, sampling=GUIDED):
    actions = torch.arange(32).view(2, 16)
    return backbone.image_dist(PROMPTS, drawn(actions), sampling).logits


def change(backbone, scope, seed=0):
    """Move every trained tensor, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in backbone.model.named_parameters():
        if name in set(backbone.trainable_names(scope)):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def log_probs(backbone, sampling=GUIDED):
    distribution = backbone.image_dist(PROMPTS, drawn(torch.arange(32).view(2, 16)), sampling)
    return distribution.log_prob(torch.arange(32).view(2, 16))


def gradients(backbone, sampling=GUIDED):
    log_probs(backbone, sampling).sum().backward()
    return {n: p.grad for n, p in backbone.model.named_parameters() if p.grad is not None}


@SCOPES
def test_gradients_are_exactly_on_the_trainable_tensors(random_janus_folder, scope):
    backbone = load(random_janus_folder, scope)
    change(backbone, scope)  # a fresh adapter has no gradient on its first factor
    names = backbone.trainable_names(scope)
    frozen = {id(p) for module in backbone.frozen_modules() for p in module.parameters()}
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_(name in names)
        assert name not in names or id(parameter) not in frozen
    found = gradients(backbone)
    assert sorted(found) == sorted(names)
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    backbone.model.zero_grad(set_to_none=True)
    if scope == "lora":
        assert all("lora_" in name for name in names)
        assert len(names) == 2 * 2 * 7  # layers x factors x projections
    else:
        modules = {name.split(".")[1] for name in names}
        assert modules == {"language_model", "generation_embeddings", "generation_aligner", "generation_head"}
        assert not any("embed_tokens" in name for name in names)


def test_drawing_never_runs_the_frozen_modules(random_janus_folder):
    """Everything may take gradients here; what reads gets none from drawing except the shared token embeddings."""
    backbone = load(random_janus_folder)
    backbone.model.requires_grad_(True)
    extra = set(gradients(backbone)) - set(backbone.trainable_names("full"))
    assert extra == {"model.language_model.embed_tokens.weight"}


def test_unknown_scopes_are_refused(random_janus_folder):
    backbone = load(random_janus_folder)
    with pytest.raises(BackboneError, match="add_lora"):
        backbone.trainable_names("lora")
    with pytest.raises(BackboneError, match="everything"):
        backbone.trainable_names("everything")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_lora_changes_no_bit_of_the_output(random_janus_folder, dtype):
    backbone = load(random_janus_folder, dtype=dtype)
    before = logits(backbone)
    drawn = backbone.rollout_images(PROMPTS, [1, 2], GUIDED)
    backbone.add_lora(4, 8)
    assert torch.equal(logits(backbone), before)
    assert torch.equal(backbone.rollout_images(PROMPTS, [1, 2], GUIDED).log_probs, drawn.log_probs)
    adapter = [p for n, p in backbone.model.named_parameters() if "lora_" in n]
    assert {p.dtype for p in adapter} == {torch.float32}
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not any(m.training for m in backbone.model.modules())


def test_lora_starts_the_same_everywhere_and_leaves_the_random_state_alone(random_janus_folder):
    torch.manual_seed(1)
    one = load(random_janus_folder, "lora")
    after_one = torch.rand(1)
    torch.manual_seed(1)
    torch.rand(5)
    two = load(random_janus_folder, "lora")
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after_one)
    parameters = dict(two.model.named_parameters())
    assert all(torch.equal(p, parameters[n]) for n, p in one.model.named_parameters())
    with pytest.raises(BackboneError, match="already"):
        one.add_lora(4, 8)


@SCOPES
def test_a_saved_policy_loads_to_the_same_model(random_janus_folder, tmp_path, scope):
    trained = load(random_janus_folder, scope)
    change(trained, scope)
    file = trained.save_policy(tmp_path, scope)
    again = JanusBackbone.from_pretrained(random_janus_folder)
    base = logits(again)
    again.load_policy(tmp_path)
    assert torch.equal(logits(again), logits(trained))
    assert not torch.equal(logits(again), base)
    names = again.trainable_names(scope)
    assert len(load_file(file)) == len(names)
    untouched = dict(JanusBackbone.from_pretrained(random_janus_folder).model.named_parameters())
    for name, parameter in again.model.named_parameters():
        if name not in names:
            assert torch.equal(parameter, untouched[name.replace(".base_layer.", ".")])


@SCOPES
def test_saving_is_reproducible_and_takes_given_values(random_janus_folder, tmp_path, scope):
    backbone = load(random_janus_folder, scope)
    one = backbone.save_policy(tmp_path / "one", scope).read_bytes()
    assert backbone.save_policy(tmp_path / "two", scope).read_bytes() == one
    parameters = dict(backbone.model.named_parameters())
    values = {name: torch.full_like(parameters[name], 0.5) for name in backbone.trainable_names(scope)}
    file = backbone.save_policy(tmp_path / "three", scope, values)
    assert all((t == 0.5).all() for t in load_file(file).values())
    values.pop(next(iter(values)))
    with pytest.raises(BackboneError, match="lacks or adds"):
        backbone.save_policy(tmp_path / "four", scope, values)


def test_full_policy_has_the_checkpoints_own_names(random_janus_folder, tmp_path):
    backbone = load(random_janus_folder)
    stored = load_file(backbone.save_policy(tmp_path, "full"))
    public = load_file(random_janus_folder / "model.safetensors")
    assert set(stored) < set(public)
    assert all(torch.equal(stored[name], public[name]) for name in stored)


def test_adapter_folder_is_one_that_peft_loads(random_janus_folder, tmp_path):
    from peft import PeftModel
    from transformers import JanusForConditionalGeneration

    trained = load(random_janus_folder, "lora")
    change(trained, "lora")
    trained.save_policy(tmp_path, "lora")
    public = JanusForConditionalGeneration.from_pretrained(random_janus_folder).eval()
    wrapped = PeftModel.from_pretrained(public, tmp_path)
    backbone = JanusBackbone(wrapped.base_model.model, trained.processor)
    assert torch.equal(logits(backbone), logits(trained))


@SCOPES
@pytest.mark.parametrize("damage", ["missing", "extra", "renamed", "shape", "truncated"])
def test_a_policy_that_does_not_fit_is_refused_by_name(random_janus_folder, tmp_path, scope, damage):
    file = load(random_janus_folder, scope).save_policy(tmp_path, scope)
    tensors = load_file(file)
    victim = sorted(tensors)[3]
    if damage in ("missing", "renamed"):
        value = tensors.pop(victim)
    if damage == "renamed":
        tensors[victim + "x"] = value
    if damage == "extra":
        tensors["lm_head.weight"] = torch.zeros(2)
    if damage == "shape":
        tensors[victim] = tensors[victim][..., :-1].contiguous()
    save_file(tensors, file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-4])
    named = {"extra": "lm_head.weight", "truncated": file.name}.get(damage, victim)
    backbone = JanusBackbone.from_pretrained(random_janus_folder)
    before = logits(backbone)
    with pytest.raises(BackboneError, match=named.replace(".", r"\.")) as caught:
        backbone.load_policy(tmp_path)
    assert file.name in str(caught.value)
    assert torch.equal(logits(backbone), before)


def test_an_empty_folder_and_a_foreign_adapter_are_refused(random_janus_folder, tmp_path):
    backbone = load(random_janus_folder)
    with pytest.raises(BackboneError, match="holds no policy"):
        backbone.load_policy(tmp_path)
    load(random_janus_folder, "lora").save_policy(tmp_path, "lora")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    with pytest.raises(BackboneError, match="q_proj"):
        backbone.load_policy(tmp_path)
    (tmp_path / "adapter_config.json").write_text("")  # as a host that lost power might leave it
    with pytest.raises(BackboneError, match="adapter_config.json: not an adapter's configuration"):
        backbone.load_policy(tmp_path)


def test_an_adapter_of_another_rank_is_refused(random_janus_folder, tmp_path):
    load(random_janus_folder, "lora").save_policy(tmp_path, "lora")
    backbone = load(random_janus_folder)
    backbone.add_lora(2, 8)
    with pytest.raises(BackboneError, match=r"\(4, 8\).*\(2, 8\)"):
        backbone.load_policy(tmp_path)


@SCOPES
def test_activation_checkpointing_gives_the_same_gradients_for_less_memory(random_janus_folder, scope):
    results, peaks = [], []
    for share in (None, 0.0, 0.5, 1.0):
        backbone = load(random_janus_folder, scope)
        change(backbone, scope)
        for name, parameter in backbone.model.named_parameters():
            parameter.requires_grad_(name in backbone.trainable_names(scope))
        if share is not None:
            backbone.enable_activation_checkpointing(share)
        peaks.append(peak_bytes(backbone.model, lambda b=backbone: log_probs(b).sum()))
        calls = []
        for i, layer in enumerate(backbone.model.model.language_model.layers):
            layer.self_attn.register_forward_pre_hook(lambda *_, c=calls, i=i: c.append(i), with_kwargs=True)
        results.append(gradients(backbone))
        assert sorted(calls) == {None: [0, 1], 0.0: [0, 1], 0.5: [0, 0, 1], 1.0: [0, 0, 1, 1]}[share]
    with pytest.raises(BackboneError, match="activation checkpointing"):
        backbone.rollout_images(PROMPTS, [0, 1], GUIDED)
    plain, *checkpointed = results
    assert all(torch.equal(plain[name], other[name]) for other in checkpointed for name in plain)
    assert peaks[0] > peaks[1] > peaks[2]
