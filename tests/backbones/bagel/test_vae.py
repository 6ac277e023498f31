"""FLUX's autoencoder from a file in the public layout."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.made_bagel import vae_shapes
from unified_rl.backbones.bagel.vae import SCALE, SHIFT, FluxVae, diffusers_name
from unified_rl.backbones.base import BackboneError


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in vae_shapes().items()}
    save_file(tensors, tmp_path / "ae.safetensors")
    return tmp_path


def test_names_are_diffusers_own_conversion(diffusers, folder):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    vae = FluxVae.from_folder(folder)
    converted = convert_ldm_vae_checkpoint(load_file(folder / "ae.safetensors"), vae.module.config)
    parameters = dict(vae.module.named_parameters())
    assert parameters.keys() == converted.keys()
    assert all(torch.equal(p, converted[name].reshape(p.shape)) for name, p in parameters.items())


def test_published_sizes_have_the_published_names():
    """The decoder's blocks are counted from the other end; names without a rule stay."""
    assert diffusers_name("decoder.up.3.block.2.conv1.bias", 4) == "decoder.up_blocks.0.resnets.2.conv1.bias"
    assert diffusers_name("decoder.up.1.upsample.conv.bias", 4) == "decoder.up_blocks.2.upsamplers.0.conv.bias"
    assert diffusers_name("encoder.down.2.block.0.nin_shortcut.bias", 4) == (
        "encoder.down_blocks.2.resnets.0.conv_shortcut.bias"
    )
    assert diffusers_name("encoder.conv_in.weight", 4) == "encoder.conv_in.weight"


def test_latents_are_scaled_and_pixels_in_range(diffusers, folder):
    vae = FluxVae.from_folder(folder)
    assert (vae.factor, vae.channels) == (4, 16)
    images = torch.rand(5, 3, 8, 12, generator=torch.Generator().manual_seed(1))
    latents = vae.encode(images)
    assert latents.shape == (5, 16, 2, 3)
    mean = vae.module.encode(images * 2 - 1).latent_dist.mean
    assert (latents - SCALE * (mean - SHIFT)).abs().max() < 1e-5
    decoded = vae.decode(latents)
    assert decoded.shape == images.shape
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    expected = (vae.module.decode(mean).sample / 2 + 0.5).clamp(0, 1)
    assert (decoded - expected).abs().max() < 1e-4


def test_sides_must_fit(diffusers, folder):
    with pytest.raises(BackboneError, match="8 x 10 pixels: sides must be multiples of 4"):
        FluxVae.from_folder(folder).encode(torch.zeros(1, 3, 8, 10))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("decoder.conv_out.bias"), "decoder.conv_out.bias is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra is not part of the model"),
        (lambda t: t.update({"encoder.conv_in.bias": torch.zeros(3)}), r"encoder.conv_in.bias has shape \[3\]"),
        (lambda t: t.pop("encoder.down.0.block.0.conv1.weight"), "is not FLUX's autoencoder: it lacks"),
    ],
)
def test_other_files_are_refused(diffusers, folder, change, said):
    tensors = load_file(folder / "ae.safetensors")
    change(tensors)
    save_file(tensors, folder / "ae.safetensors")
    with pytest.raises(BackboneError, match=said):
        FluxVae.from_folder(folder)


def test_missing_file_and_missing_package_are_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(BackboneError, match="pip install diffusers"):
        FluxVae.from_folder(folder)
    (folder / "ae.safetensors").unlink()
    with pytest.raises(BackboneError, match="has no ae.safetensors"):
        FluxVae.from_folder(folder)
