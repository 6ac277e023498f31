"""A tiny Janus with random weights, for tests that need a model but not a trained one."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.made_bagel import build_random_bagel

VQ_CODES = 96


def build_random_janus(
    folder: Path, side: int = 4, patch: int = 8, width: int = 64, codes: int = VQ_CODES, **text: int
) -> None:
    """Write a Janus in Hugging Face layout: `side` x `side` image tokens of `patch` pixels, random weights, fixed seed.

    Weights are several times larger than transformers initialises them, so that the distributions are far from uniform.
    """
    from transformers import JanusForConditionalGeneration, JanusProcessor
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    from unified_rl.shapes.tiny_janus import CHAT_TEMPLATE, build_tokenizer

    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = JanusForConditionalGeneration(random_config(tokenizer, side, patch, width, codes, **text))
        for parameter in model.model.language_model.parameters():
            if parameter.ndim > 1:
                parameter.data *= 3
        for parameter in [*model.model.generation_head.parameters(), *model.model.generation_aligner.parameters()]:
            parameter.data *= 8
        model.lm_head.weight.data *= 10
        model.model.vqmodel.quantize.embedding.weight.data.normal_()
    images = JanusImageProcessorPil(
        size={"height": side * patch, "width": side * patch},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        min_size=patch,
    )
    processor = JanusProcessor(
        image_processor=images, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE, num_image_tokens=side * side
    )
    model.generation_config = generation_config(tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # A checkpoint may leave it out, and transformers' default is to tie.
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("tie_word_embeddings") is False
    (folder / "config.json").write_text(json.dumps(config))


def generation_config(tokenizer: object) -> object:
    """What transformers' own `generate` needs; the backbone does not read it."""
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        generation_kwargs={"boi_token_id": tokenizer.boi_token_id},
    )


def random_config(tokenizer: object, side: int, patch: int, width: int, codes: int, **text: int) -> object:
    """A `JanusConfig` of two thin layers; `text` overrides entries of the language model's configuration."""
    from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

    language = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **text}
    language.setdefault("vocab_size", len(tokenizer))
    return JanusConfig(
        text_config=LlamaConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **language,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=side * patch,
            patch_size=patch,
            mlp_ratio=2.0,
            projection_dim=width,
            depth=2,
            num_image_tokens=side * side,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=codes,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1] * patch.bit_length(),  # one halving between two entries
            num_res_blocks=1,
            projection_dim=width,
            num_hidden_layers=2,
            image_token_embed_dim=width,
        ),
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="session")
def random_janus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a random tiny Janus: 16 image tokens, 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("random-janus")
    build_random_janus(folder)
    return folder


@pytest.fixture(scope="session")
def random_bagel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of a random tiny BAGEL: 2 x 3 cells, 32 x 48 pixels."""
    folder = tmp_path_factory.mktemp("random-bagel")
    build_random_bagel(folder)
    return folder


@pytest.fixture(scope="session")
def janus_builder() -> Callable[..., None]:
    """`build_random_janus`, for tests that need other sizes."""
    return build_random_janus


@dataclass(frozen=True)
class SmallDisk:
    """A file system in memory with a size of its own."""

    folder: Path

    def resize(self, kilobytes: int) -> None:
        """Make it so large."""
        self.mount(f"remount,size={kilobytes}k")

    def mount(self, option: str) -> None:
        """Mount it, or change it."""
        command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(self.folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A tmpfs that a test can fill."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    disk = SmallDisk(tmp_path / "small")
    disk.folder.mkdir()
    disk.mount("size=64m")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk.folder)], check=True)
