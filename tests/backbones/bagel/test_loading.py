"""Checkpoint folders: sizes from their JSON files, weights strictly by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from unified_rl.backbones.bagel.config import BagelConfig, LanguageConfig, VisionConfig, table_side
from unified_rl.backbones.bagel.loading import Weights, check_names, fill, load_model
from unified_rl.backbones.bagel.model import BagelModel
from unified_rl.backbones.base import BackboneError

LLM = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
VIT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,  # one more than the weights hold, as in the public file
    "num_attention_heads": 4,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
}
ONE = "vae2llm.weight"


@pytest.fixture(scope="session")
def tensors(golden):
    return {name: golden.weights.read(name) for name in golden.weights.shapes}


@pytest.fixture
def folder(tmp_path, tensors):
    """A complete checkpoint folder."""
    (tmp_path / "llm_config.json").write_text(json.dumps(LLM))
    (tmp_path / "vit_config.json").write_text(json.dumps(VIT))
    save_file(tensors, tmp_path / "ema.safetensors")
    return tmp_path


def write_shards(folder, tensors, count=3):
    """The same weights as `count` shards and an index."""
    (folder / "ema.safetensors").unlink()
    listed = {}
    for i in range(count):
        name = f"ema-{i + 1:05d}-of-{count:05d}.safetensors"
        part = dict(list(tensors.items())[i::count])
        save_file(part, folder / name)
        listed |= dict.fromkeys(part, name)
    (folder / "ema.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return listed


def assert_holds(model, tensors):
    assert dict(model.named_parameters()).keys() == tensors.keys()
    assert all(torch.equal(p, tensors[name]) for name, p in model.named_parameters())


def test_folder_loads_by_name(folder, tensors, config):
    model = load_model(folder)
    assert_holds(model, tensors)
    assert model.config == config
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in load_model(folder, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_shards_load_like_one_file(folder, tensors):
    write_shards(folder, tensors)
    assert_holds(load_model(folder), tensors)


def test_a_tensor_is_in_memory_at_a_time(folder, tensors):
    """Filling asks for tensors one by one; a placing that does not want one never reads it."""
    weights, read = Weights.from_folder(folder), []
    config = BagelConfig.from_folder(folder, weights.shapes)
    model = BagelModel(config)
    before = model.vae2llm.weight.clone()

    def place(name, parameter, get):
        if name == "llm2vae.weight":
            read.append(name)
            parameter.copy_(get())

    fill(model, weights, place)
    assert read == ["llm2vae.weight"]
    assert torch.equal(model.llm2vae.weight, tensors["llm2vae.weight"])
    assert torch.equal(model.vae2llm.weight, before)


def test_position_tables_may_be_left_out(folder, tensors):
    kept = {name: t for name, t in tensors.items() if not name.endswith("pos_embed.pos_embed")}
    save_file(kept, folder / "ema.safetensors")
    (folder / "config.json").write_text(json.dumps({"max_latent_size": 8, "vit_max_num_patch_per_side": 10}))
    assert_holds(load_model(folder), tensors)


def test_length_of_a_table_outweighs_the_configuration(folder):
    """The public config.json says 32 where the table is for 64."""
    (folder / "config.json").write_text(json.dumps({"max_latent_size": 4}))
    assert load_model(folder).config.latent_side == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(ONE), "missing: vae2llm.weight"),
        (lambda t: t.update(extra=torch.zeros(1)), "not part of the model: extra"),
        (lambda t: t.update({ONE: torch.zeros(64, 63)}), r"vae2llm.weight has shape \[64, 63\], the model \[64, 64\]"),
    ],
    ids=["missing", "unexpected", "shape"],
)
@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "shards"])
def test_weights_that_do_not_fit_are_refused(folder, tensors, change, said, sharded):
    tensors = dict(tensors)
    change(tensors)
    save_file(tensors, folder / "ema.safetensors")
    if sharded:
        write_shards(folder, tensors)
    with pytest.raises(BackboneError, match=said) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)


def test_many_missing_tensors_are_counted(folder, tensors):
    save_file({n: t for n, t in tensors.items() if ".layers.1." not in n or "vit" in n}, folder / "ema.safetensors")
    with pytest.raises(BackboneError, match="missing: .*input_layernorm.weight.* and 23 more"):
        load_model(folder)


def test_nothing_is_read_before_names_are_checked(folder, tensors, monkeypatch):
    save_file({ONE: tensors[ONE]}, folder / "ema.safetensors")
    monkeypatch.setattr(Weights, "read", lambda *_: pytest.fail("read"))
    (folder / "vit_config.json").write_text(json.dumps(VIT | {"num_hidden_layers": 1}))
    with pytest.raises(BackboneError, match="missing"):
        load_model(folder)


def test_shards_must_be_complete_and_agree_with_the_index(folder, tensors):
    listed = write_shards(folder, tensors)
    index = folder / "ema.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed | {ONE: "ema-00009-of-00009.safetensors"}}))
    with pytest.raises(BackboneError, match="shards that are not there: ema-00009-of-00009"):
        load_model(folder)
    other = next(name for name in listed.values() if name != listed[ONE])
    index.write_text(json.dumps({"weight_map": listed | {ONE: other}}))
    with pytest.raises(BackboneError, match=f"do not hold what it lists: {ONE}"):
        load_model(folder)
    index.write_text("[]")
    with pytest.raises(BackboneError, match="not an index"):
        load_model(folder)


def test_a_tensor_in_two_shards_is_refused(folder, tensors):
    listed = write_shards(folder, tensors)
    name = next(name for name in listed.values() if name != listed[ONE])
    held = {n: tensors[n] for n, shard in listed.items() if shard == name}
    save_file(held | {ONE: tensors[ONE]}, folder / name)
    with pytest.raises(BackboneError, match=f"{ONE} is both in"):
        load_model(folder)


def test_damaged_and_absent_weights_are_named(folder):
    (folder / "ema.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(BackboneError, match="ema.safetensors cannot be read"):
        load_model(folder)
    (folder / "ema.safetensors").unlink()
    with pytest.raises(BackboneError, match="neither ema.safetensors nor"):
        load_model(folder)


def test_partitioned_models_are_checked_before(tensors, golden, config):
    with torch.device("meta"):
        model = BagelModel(config)
    check_names(model, golden.weights)


# ---- configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("llm_config.json", {"hidden_act": "gelu"}, "llm_config.json: hidden_act is 'gelu'; only 'silu'"),
        ("llm_config.json", {"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ("llm_config.json", {"vocab_size": "300"}, "llm_config.json: vocab_size must be a whole number"),
        ("llm_config.json", {"rms_norm_eps": 0}, "rms_norm_eps must be a number above 0"),
        ("llm_config.json", {"num_attention_heads": 3}, "hidden size 64"),
        ("llm_config.json", {"num_key_value_heads": 3}, "4 heads do not share 3"),
        ("vit_config.json", {"num_hidden_layers": 5}, "num_hidden_layers is 5, but the weights hold 2"),
        ("vit_config.json", {"num_attention_heads": 5}, "vision tower: hidden size 48"),
        ("config.json", {"interpolate_pos": True}, "config.json: interpolate_pos is True"),
        ("config.json", {"connector_act": "relu"}, "config.json: connector_act is 'relu'"),
        ("config.json", {"vae_config": {"z_channels": "16"}}, "z_channels must be a whole number"),
        ("config.json", {"latent_patch_size": 0}, "latent_patch_size must be a whole number"),
    ],
)
def test_other_architectures_are_refused(folder, file, values, said):
    known = {"llm_config.json": LLM, "vit_config.json": VIT, "config.json": {}}[file]
    (folder / file).write_text(json.dumps(known | values))
    with pytest.raises(BackboneError, match=said):
        load_model(folder)


def test_weights_overrule_what_the_public_code_ignores(folder, tensors):
    (folder / "llm_config.json").write_text(json.dumps(LLM | {"qk_norm": False, "tie_word_embeddings": True}))
    (folder / "vit_config.json").write_text(json.dumps(VIT | {"rope": True}))
    (folder / "config.json").write_text(json.dumps({"vae_config": {"z_channels": 16, "downsample": 8}}))
    assert_holds(load_model(folder), tensors)


@pytest.mark.parametrize("file", ["llm_config.json", "vit_config.json"])
def test_incomplete_folder_is_named(folder, file):
    (folder / file).write_text("{")
    with pytest.raises(BackboneError, match=f"{file} cannot be read"):
        load_model(folder)
    (folder / file).write_text("[]")
    with pytest.raises(BackboneError, match=f"{file} must hold a JSON object"):
        load_model(folder)
    (folder / file).unlink()
    with pytest.raises(BackboneError, match=f"it has no {file}"):
        load_model(folder)


def test_defaults_are_the_published_sizes():
    config = BagelConfig()
    assert config.latent_width == 64
    assert config.language.head_size == 128
    assert (config.language, config.vision) == (LanguageConfig(), VisionConfig())


def test_a_table_must_be_a_square():
    assert table_side({"t": (100, 3)}, "t", 7) == 10
    assert table_side({}, "t", 7) == 7
    with pytest.raises(BackboneError, match="t has 99 rows"):
        table_side({"t": (99, 3)}, "t", 7)
