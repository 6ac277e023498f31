"""The numbers of the public code, and the command that compares with them."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from unified_rl.backbones.bagel import verify
from unified_rl.backbones.bagel.context import Context
from unified_rl.backbones.bagel.positions import sincos_table
from unified_rl.backbones.bagel.sequence import pack
from unified_rl.backbones.base import BackboneError


@pytest.fixture
def copy(golden_file, tmp_path):
    """Writes the golden file with changes: a tensor for a name, None to leave it out."""

    def write(**changes):
        tensors = load_file(golden_file)
        for name, value in changes.items():
            name = name.replace("__", ".")
            if value is None:
                del tensors[name]
            else:
                tensors[name] = value(tensors[name])
        save_file(tensors, tmp_path / "changed.safetensors")
        return tmp_path / "changed.safetensors"

    return write


def test_command_prints_two_differences_below_the_tolerance(golden_file):
    done = subprocess.run(
        [sys.executable, "-m", "unified_rl.backbones.bagel.verify", str(golden_file)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout)
    assert differences.keys() == {"text_logits", "velocity"}
    assert all(0 <= value < 1e-5 for value in differences.values())


def test_all_tensors_of_the_file_are_parameters(golden, model):
    parameters = dict(model.named_parameters())
    assert len(parameters) == 139
    assert {name: tuple(p.shape) for name, p in parameters.items()} == golden.weights.shapes
    assert all(torch.equal(p, golden.weights.read(name)) for name, p in parameters.items())


def test_position_tables_are_those_of_the_public_code(golden):
    assert torch.equal(sincos_table(8, 64), golden.weights.read("latent_pos_embed.pos_embed"))
    assert torch.equal(sincos_table(10, 64), golden.weights.read("vit_pos_embed.pos_embed"))


def test_everything_in_one_pass_gives_the_same_numbers(model, golden, segments):
    """Noisy latents seen by nobody, all of one row: reading and drawing need no separate passes."""
    packed = pack([segments], model.config, verify.SPECIAL)
    with torch.no_grad():
        hidden, context = model(packed, Context.empty(1))
        rows = packed.in_rows(hidden.understanding)
        second_text = (packed.segments[0] == 3).nonzero()[:, 0]
        logits = model.logits(rows[0, second_text])
        velocity = model.llm2vae(hidden.generation)[24:]
    assert (logits - golden.outputs.read("text_2_logits")).abs().max() < 1e-5
    assert (velocity - golden.outputs.read("velocity")).abs().max() < 1e-5
    assert context.valid.sum().item() == 46  # the noisy block is not part of the context
    assert context.next_position.tolist() == [14]


def test_exit_code_tells_a_wrong_number(copy, capsys):
    assert verify.main([str(copy(outputs__velocity=lambda v: v + 2e-5))]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["velocity"] > 1e-5 > shown["text_logits"]


def test_a_difference_that_is_no_number_is_a_failure(copy, capsys):
    assert verify.main([str(copy(outputs__text_2_logits=lambda v: v * float("nan")))]) == 1
    assert json.loads(capsys.readouterr().out)["text_logits"] is None


def test_other_lengths_and_pictures_are_computed(copy, capsys):
    """Outputs of another shape than the inputs ask for are an error that names both."""
    file = copy(inputs__text_2=lambda ids: torch.cat([ids, ids]))
    assert verify.main([str(file)]) == 2
    assert "outputs.text_2_logits has shape [5, 300], the model gives [8, 300]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("inputs__text_1", "lacks inputs: inputs.text_1"),
        ("outputs__velocity", "lacks outputs: outputs.velocity"),
        ("weights__vae2llm__weight", "lacks weights: weights.vae2llm.weight"),
        ("weights__language_model__model__norm__weight", "missing: language_model.model.norm.weight"),
    ],
)
def test_incomplete_file_is_refused(copy, capsys, name, said):
    assert verify.main([str(copy(**{name: None}))]) == 2
    assert said in capsys.readouterr().err


def test_no_safetensors_file_is_refused(tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    assert verify.main([str(tmp_path / "x.safetensors")]) == 2
    assert "x.safetensors cannot be read as safetensors" in capsys.readouterr().err
    assert verify.main([str(tmp_path / "absent.safetensors")]) == 2


def test_flags_must_fit_the_weights(golden_file, golden):
    with pytest.raises(BackboneError, match="--vit-patch"):
        verify.sizes_of(golden.weights, verify.parser().parse_args([str(golden_file), "--vit-patch", "16"]))
    with pytest.raises(SystemExit):
        verify.parser().parse_args([str(golden_file), "--heads", "0"])
