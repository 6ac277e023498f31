"""The tiny BAGEL before training: configuration, tokenizer and weights, in the layout of the public checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from unified_rl.backbones.bagel.config import BagelConfig, LanguageConfig, VisionConfig
from unified_rl.backbones.bagel.inputs import SETTINGS
from unified_rl.backbones.bagel.loading import WEIGHTS
from unified_rl.backbones.bagel.model import BagelModel
from unified_rl.shapes.tiny_janus import PATCH
from unified_rl.shapes.train_vae import CELLS_A_SIDE, CHANNELS, build_vae, save_vae
from unified_rl.shapes.vocabulary import corpus, train_bpe
from unified_rl.shapes.world import IMAGE_SIZE

HIDDEN = 160
START, END, VISION_START, VISION_END = "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"
PAD = "<|endoftext|>"
WEIGHT_SPREAD, EMBEDDING_SPREAD = 0.05, 0.5  # of random weights; position tables have entries up to 1
LATENT_PATCH = 2


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The world's words with BAGEL's special tokens; nothing is prepended."""
    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(corpus(), [PAD, START, END, VISION_START, VISION_END]),
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[START, END, VISION_START, VISION_END],
        clean_up_tokenization_spaces=False,
    )


def build_config(vocabulary: int) -> BagelConfig:
    """BAGEL's architecture at width 160."""
    return BagelConfig(
        LanguageConfig(HIDDEN, intermediate=416, layers=5, heads=8, kv_heads=4, vocabulary=vocabulary),
        VisionConfig(hidden=128, intermediate=256, layers=3, heads=4, patch=PATCH, side=IMAGE_SIZE // PATCH),
        latent_patch=LATENT_PATCH,
        latent_channels=CHANNELS,
        latent_side=CELLS_A_SIDE // LATENT_PATCH,
    )


def random_model(config: BagelConfig, seed: int) -> BagelModel:
    """A model with random weights."""
    generator = torch.Generator().manual_seed(seed)
    model = BagelModel(config)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            spread = EMBEDDING_SPREAD if isinstance(module, nn.Embedding) else WEIGHT_SPREAD
            nn.init.normal_(module.weight, std=spread, generator=generator)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
    return model


def save_model(model: BagelModel, folder: Path) -> None:
    """Write `ema.safetensors` in fp16."""
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, folder / WEIGHTS)


def write_json(config: BagelConfig, folder: Path) -> None:
    """The public checkpoint's JSON files, in which one layer of the vision tower is listed that the weights lack."""
    language, vision = config.language, config.vision
    files = {
        "config.json": {
            "architectures": ["BagelForConditionalGeneration"],
            "connector_act": "gelu_pytorch_tanh",
            "interpolate_pos": False,
            "latent_patch_size": config.latent_patch,
            "max_latent_size": config.latent_side,
            "model_type": "bagel",
            "vae_config": {"downsample": PATCH, "z_channels": config.latent_channels},
            "vit_max_num_patch_per_side": vision.side,
        },
        "llm_config.json": {
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": language.hidden,
            "intermediate_size": language.intermediate,
            "max_position_embeddings": 512,
            "model_type": "qwen2",
            "num_attention_heads": language.heads,
            "num_hidden_layers": language.layers,
            "num_key_value_heads": language.kv_heads,
            "rms_norm_eps": language.norm_eps,
            "rope_theta": language.rope_theta,
            "tie_word_embeddings": False,
            "vocab_size": language.vocabulary,
        },
        "vit_config.json": {
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": vision.hidden,
            "image_size": IMAGE_SIZE,
            "intermediate_size": vision.intermediate,
            "layer_norm_eps": vision.norm_eps,
            "model_type": "siglip_vision_model",
            "num_attention_heads": vision.heads,
            "num_hidden_layers": vision.layers + 1,
            "patch_size": vision.patch,
        },
        SETTINGS: {
            "drawn": [IMAGE_SIZE, IMAGE_SIZE],
            "vit": {"longest": IMAGE_SIZE, "shortest": IMAGE_SIZE},
        },
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def build_checkpoint(folder: Path, seed: int) -> None:
    """Write a randomly initialised checkpoint to `folder`."""
    tokenizer = build_tokenizer()
    config = build_config(len(tokenizer))
    tokenizer.save_pretrained(folder)
    write_json(config, folder)
    save_model(random_model(config, seed), folder)
    save_vae(build_vae(seed), folder)
