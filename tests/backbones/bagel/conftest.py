"""The golden file and the model in it: random weights at a tiny size under the public names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from unified_rl.backbones.bagel import verify
from unified_rl.backbones.bagel.loading import build
from unified_rl.backbones.bagel.sequence import Latent, Picture, Text, patchify

GOLDEN = Path(__file__).parents[1] / "fixtures" / "bagel_golden.safetensors"


@pytest.fixture(scope="session")
def golden_file():
    return GOLDEN


@pytest.fixture(scope="session")
def golden():
    return verify.Golden.open(GOLDEN)


@pytest.fixture(scope="session")
def config(golden):
    return verify.sizes_of(golden.weights, verify.parser().parse_args([str(GOLDEN)]))


@pytest.fixture
def fresh(golden, config):
    """A model that a test may change."""
    return build(config, golden.weights, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="session")
def model(golden, config):
    return build(config, golden.weights, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="session")
def segments(golden):
    """The golden sequence: picture, text, clean latent, text, noisy latent."""
    read = golden.inputs.read
    latent = read("clean_latent")
    rows, columns = latent.shape[1] // 2, latent.shape[2] // 2
    return [
        Picture(read("vit_pixels")),
        Text(verify.SPECIAL.wrap(read("text_1").tolist())),
        Latent(patchify(latent, 2), rows, columns),
        Text(verify.SPECIAL.wrap(read("text_2").tolist())),
        Latent(read("noise_tokens"), rows, columns, verify.NOISY_TIME, noisy=True),
    ]
