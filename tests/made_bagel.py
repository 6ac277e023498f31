"""A tiny BAGEL with random weights in the public layout, for tests that need a model but not a trained one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
SETTINGS = {"vit": {"shortest": 16, "longest": 32}, "drawn": [32, 48], "think": "Plan it first."}
CORPUS = ["a red circle", "two rings left of a blue square", "What is it? yes no", "Plan it first."] * 4


def vae_shapes(channels: Sequence[int] = (32, 64, 64), blocks: int = 1, latent: int = 16) -> dict[str, tuple[int, ...]]:
    """Names and shapes of `ae.safetensors`, spelt out.

    Args:
        channels: of each level, at full resolution first.
        blocks: of each level of the encoder; the decoder has one more.
    """
    shapes, last = {}, channels[-1]

    def conv(name, inputs, outputs, size=3):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs, size, size), (outputs,)

    def norm(name, channels):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (channels,)

    def block(name, inputs, outputs):
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def middle(name, channels, out):
        block(f"{name}.mid.block_1", channels, channels)
        norm(f"{name}.mid.attn_1.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.mid.attn_1.{part}", channels, channels, 1)
        block(f"{name}.mid.block_2", channels, channels)
        norm(f"{name}.norm_out", out)

    conv("encoder.conv_in", 3, channels[0])
    for level, (inputs, outputs) in enumerate(zip([channels[0], *channels], channels, strict=False)):
        for number in range(blocks):
            block(f"encoder.down.{level}.block.{number}", outputs if number else inputs, outputs)
        if level < len(channels) - 1:
            conv(f"encoder.down.{level}.downsample.conv", outputs, outputs)
    middle("encoder", last, last)
    conv("encoder.conv_out", last, 2 * latent)
    conv("decoder.conv_in", latent, last)
    middle("decoder", last, channels[0])
    for level, (inputs, outputs) in enumerate(zip([*channels[1:], last], channels, strict=True)):
        for number in range(blocks + 1):
            block(f"decoder.up.{level}.block.{number}", outputs if number else inputs, outputs)
        if level:
            conv(f"decoder.up.{level}.upsample.conv", outputs, outputs)
    conv("decoder.conv_out", channels[0], 3)
    return shapes


def build_tokenizer() -> object:
    """Byte-level BPE in which the texts of CORPUS are short."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=list(SPECIALS), show_progress=False, initial_alphabet=alphabet
    )
    bpe.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=SPECIALS[2], pad_token=SPECIALS[0])


def random_model(vocabulary: int) -> object:
    """A `BagelModel` of two thin layers whose outputs are far from uniform; fixed seed."""
    from unified_rl.backbones.bagel.config import BagelConfig, LanguageConfig, VisionConfig
    from unified_rl.backbones.bagel.model import BagelModel

    language = replace(
        LanguageConfig(), hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, vocabulary=vocabulary
    )
    vision = VisionConfig(hidden=32, intermediate=48, layers=2, heads=2, patch=8, side=6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BagelModel(BagelConfig(language, vision, latent_patch=2, latent_channels=4, latent_side=5))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data += 0.2 * torch.randn_like(parameter)
            elif parameter.ndim > 1 and name.startswith(("language_model.model.layers", "time_embedder", "vae2llm")):
                parameter.data *= 2
        model.language_model.lm_head.weight.data *= 6
        model.llm2vae.weight.data *= 3
        for layer in (model.connector.fc1, model.connector.fc2):
            layer.weight.data *= 5  # what is seen matters as much as what is asked
    return model


def build_random_bagel(folder: Path) -> None:
    """Write a BAGEL that draws 32 x 48 pixels as 2 x 3 cells of 16 numbers, and reads up to 32 pixels a side."""
    tokenizer = build_tokenizer()
    model = random_model(len(tokenizer))
    language, vision = model.config.language, model.config.vision
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": {"model_type": "bagel", "vae_config": {"z_channels": model.config.latent_channels}},
        "unified_rl.json": SETTINGS,
        "llm_config.json": {
            "hidden_size": language.hidden,
            "intermediate_size": language.intermediate,
            "num_hidden_layers": language.layers,
            "num_attention_heads": language.heads,
            "num_key_value_heads": language.kv_heads,
            "vocab_size": language.vocabulary,
        },
        "vit_config.json": {
            "hidden_size": vision.hidden,
            "intermediate_size": vision.intermediate,
            "num_hidden_layers": vision.layers + 1,  # one more than the weights hold, as in the public file
            "num_attention_heads": vision.heads,
            "patch_size": vision.patch,
        },
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    save_file(model.state_dict(), folder / "ema.safetensors")
    generator = torch.Generator().manual_seed(0)
    shapes = vae_shapes(channels=(32, 32, 32, 32), latent=model.config.latent_channels)
    vae = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
    vae["decoder.conv_out.weight"] *= 3  # contrast
    save_file(vae, folder / "ae.safetensors")
    tokenizer.save_pretrained(folder)
