"""What of a BAGEL is trained, and how it is stored."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unified_rl.backbones.bagel.backbone import BagelBackbone
from unified_rl.backbones.bagel.flow import FlowSampling
from unified_rl.backbones.base import BackboneError
from unified_rl.backbones.load import load_backbone
from unified_rl.config import BackboneConfig
from unified_rl.train.drawing import drawing_modules, select_trainable
from unified_rl.train.export import merge_lora

PROMPTS = ["a red circle", "two rings"]
SAMPLING = FlowSampling(steps=5, eta=0.7, guidance_scale=2.0)
SCOPES = pytest.mark.parametrize("scope", ["full", "lora"])
PROJECTIONS = (
    *(f"self_attn.{kind}_proj_moe_gen" for kind in "qkvo"),
    *(f"mlp_moe_gen.{kind}_proj" for kind in ("gate", "up", "down")),
)


def load(folder, scope="full"):
    backbone = BagelBackbone.from_pretrained(folder)
    if scope == "lora":
        backbone.add_lora(4, 8)
    return backbone


def change(backbone, scope):
    """Other values in everything that `scope` trains."""
    parameters = dict(backbone.model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    for name in backbone.trainable_names(scope):
        parameters[name].data += 0.05 * torch.randn(parameters[name].shape, generator=generator)


def drawn(backbone):
    return backbone.rollout_images(PROMPTS, [1, 2], SAMPLING)


def answer(backbone):
    return backbone.text_logps([None], ["What is it?"], ["two rings"]).log_probs


def gradients(backbone, scope, trajectory):
    """Of both losses of training, for every parameter that has one."""
    select_trainable(backbone, scope, torch.float32)
    backbone.image_dist(PROMPTS, trajectory, SAMPLING).log_prob(trajectory.taken).sum().backward()
    backbone.cell_losses(PROMPTS, trajectory, [3, 4]).sum().backward()
    return {name: p.grad for name, p in backbone.model.named_parameters() if p.grad is not None}


def test_full_scope_trains_what_draws(random_bagel_folder):
    backbone = load(random_bagel_folder)
    names = backbone.trainable_names("full")
    public = load_file(random_bagel_folder / "ema.safetensors")
    assert set(public) == {name for name, _ in backbone.model.named_parameters()}
    outside = {name for name in names if "_moe_gen" not in name}
    assert outside == {
        f"{module}.{kind}"
        for module in ("vae2llm", "llm2vae", "time_embedder.mlp.0", "time_embedder.mlp.2")
        for kind in ("weight", "bias")
    }
    assert {name for name in public if "_moe_gen" in name} == set(names) - outside
    with pytest.raises(BackboneError, match="unknown scope 'lm'"):
        backbone.trainable_names("lm")
    with pytest.raises(BackboneError, match="needs add_lora"):
        backbone.trainable_names("lora")


def test_lora_goes_on_the_projections_that_draw(random_bagel_folder):
    names = load(random_bagel_folder, "lora").trainable_names("lora")
    assert set(names) == {
        f"language_model.model.layers.{layer}.{projection}.lora_{part}.default.weight"
        for layer in range(2)
        for projection in PROJECTIONS
        for part in "AB"
    }


@SCOPES
def test_gradients_reach_what_is_trained_and_nothing_else(random_bagel_folder, scope):
    backbone = load(random_bagel_folder, scope)
    change(backbone, scope)
    found = gradients(backbone, scope, drawn(backbone))
    assert found.keys() == set(backbone.trainable_names(scope))
    assert all(gradient.abs().max() > 0 for gradient in found.values())


def test_gradients_reach_the_prompt_when_what_reads_is_trained(random_bagel_folder):
    backbone = load(random_bagel_folder)
    trajectory = drawn(backbone)
    embeddings = backbone.model.language_model.model.embed_tokens.weight.requires_grad_()
    backbone.image_dist(PROMPTS, trajectory, SAMPLING).log_prob(trajectory.taken).sum().backward()
    written = embeddings.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert set(backbone.inputs.ids(PROMPTS[0])) <= set(written)


@SCOPES
def test_recomputed_layers_give_the_same_gradients(random_bagel_folder, scope):
    plain, recomputed = load(random_bagel_folder, scope), load(random_bagel_folder, scope)
    for backbone in (plain, recomputed):
        change(backbone, scope)
    recomputed.enable_activation_checkpointing()
    trajectory = drawn(recomputed)
    expected, found = (gradients(backbone, scope, trajectory) for backbone in (plain, recomputed))
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())


def test_drawing_needs_none_of_the_frozen_modules(random_bagel_folder):
    backbone = load(random_bagel_folder)
    expected = drawn(backbone).final
    used = {
        id(p) for _, module in drawing_modules(backbone.model, backbone.frozen_modules()) for p in module.parameters()
    }
    names = {name for name, p in backbone.model.named_parameters() if id(p) in used}
    assert names >= set(backbone.trainable_names("full"))
    for name, parameter in backbone.model.named_parameters():
        if name not in names:
            parameter.data.fill_(torch.nan)
    trajectory = drawn(backbone)
    assert torch.equal(trajectory.final, expected)
    assert backbone.cell_losses(PROMPTS, trajectory, [1, 2]).isfinite().all()
    assert answer(backbone).isnan().any()


def test_fresh_lora_changes_no_bit(random_bagel_folder):
    backbone = load(random_bagel_folder)
    before = drawn(backbone)
    backbone.add_lora(4, 8)
    assert torch.equal(drawn(backbone).latents, before.latents)
    assert {p.dtype for n, p in backbone.model.named_parameters() if "lora_" in n} == {torch.float32}


@SCOPES
def test_a_saved_policy_loads_to_the_same_model(random_bagel_folder, tmp_path, scope):
    trained, again = load(random_bagel_folder, scope), load(random_bagel_folder)
    change(trained, scope)
    file = trained.save_policy(tmp_path, scope)
    base, read = drawn(again), answer(again)
    again.load_policy(tmp_path)
    assert torch.equal(drawn(again).latents, drawn(trained).latents)
    assert not torch.equal(drawn(again).latents, base.latents)
    assert torch.equal(answer(again), read)
    assert len(load_file(file)) == len(again.trainable_names(scope))


def test_a_full_policy_has_the_checkpoints_own_names(random_bagel_folder, tmp_path):
    stored = load_file(load(random_bagel_folder).save_policy(tmp_path, "full"))
    public = load_file(random_bagel_folder / "ema.safetensors")
    assert all(torch.equal(tensor, public[name]) for name, tensor in stored.items())


def test_a_policy_of_another_family_is_refused(random_bagel_folder, random_janus_folder, tmp_path):
    from unified_rl.backbones.janus import JanusBackbone

    janus = JanusBackbone.from_pretrained(random_janus_folder)
    janus.save_policy(tmp_path / "full", "full")
    janus.add_lora(4, 8)
    janus.save_policy(tmp_path / "lora", "lora")
    with pytest.raises(BackboneError, match="does not fit the model"):
        load(random_bagel_folder).load_policy(tmp_path / "full")
    with pytest.raises(BackboneError, match="this backbone adapts"):
        load(random_bagel_folder).load_policy(tmp_path / "lora")


# ---- whole checkpoints --------------------------------------------------------------------------------------------


@SCOPES
def test_a_saved_checkpoint_is_one(random_bagel_folder, tmp_path, scope):
    trained = load(random_bagel_folder, scope)
    change(trained, scope)
    if scope == "lora":
        with pytest.raises(BackboneError, match="merge it"):
            trained.save_checkpoint(tmp_path / "early")
        merge_lora(trained.model)
    trained.save_checkpoint(tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in random_bagel_folder.iterdir()}
    again = load(tmp_path / "out")
    assert torch.equal(drawn(again).latents, drawn(trained).latents)
    assert torch.equal(answer(again), answer(trained))
    assert (again.decode(drawn(again)) == trained.decode(drawn(trained))).all()


def test_a_checkpoint_from_shards_is_saved_as_one_file(random_bagel_folder, tmp_path):
    from safetensors.torch import save_file

    shards = tmp_path / "shards"
    shards.mkdir()
    for file in random_bagel_folder.iterdir():
        if file.name != "ema.safetensors":
            (shards / file.name).symlink_to(file)
    (shards / "README.md").write_text("of the download")
    tensors, listed = load_file(random_bagel_folder / "ema.safetensors"), {}
    for number in range(2):
        part = dict(list(tensors.items())[number::2])
        save_file(part, shards / f"ema-{number}.safetensors")
        listed |= dict.fromkeys(part, f"ema-{number}.safetensors")
    (shards / "ema.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    load(shards).save_checkpoint(tmp_path / "out")
    names = {f.name for f in random_bagel_folder.iterdir()} | {"README.md"}
    assert {f.name for f in (tmp_path / "out").iterdir()} == names
    saved = load_file(tmp_path / "out" / "ema.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())


def test_the_family_is_chosen_by_the_configuration(random_bagel_folder, tmp_path):
    trained = load(random_bagel_folder)
    change(trained, "full")
    trained.save_policy(tmp_path, "full")
    config = BackboneConfig(family="bagel", path=str(random_bagel_folder), dtype="float32", device="cpu")
    backbone = load_backbone(config, policy=tmp_path)
    assert backbone.family == "bagel"
    assert Path(backbone.path) == random_bagel_folder
    assert torch.equal(drawn(backbone).latents, drawn(trained).latents)
