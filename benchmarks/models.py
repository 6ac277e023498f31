"""Models of the public shapes at any width, with random weights, that the benchmarks measure."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import JanusConfig, JanusProcessor, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from unified_rl.backbones.bagel.backbone import BagelBackbone
from unified_rl.backbones.bagel.config import BagelConfig, LanguageConfig, VisionConfig
from unified_rl.backbones.bagel.inputs import InputSettings
from unified_rl.backbones.bagel.vae import FluxVae
from unified_rl.backbones.janus import JanusBackbone, JanusForConditionalGeneration
from unified_rl.shapes import tiny_bagel, tiny_janus
from unified_rl.shapes.train_vae import CHANNELS, build_vae, save_vae


def janus(
    width: int,
    layers: int,
    side: int = 24,
    head: int = 64,
    vocabulary: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> JanusBackbone:
    """Pictures of side x side patches of 16 x 16 pixels; a vision tower of half the language model's width.

    Args:
        head: width of an attention head.
        vocabulary: of texts; 0 is the small one of the tokenizer. Janus-Pro has 102,400.
    """
    tokenizer = tiny_janus.build_tokenizer()
    pixels = 16 * side
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=vocabulary or len(tokenizer),
            hidden_size=width,
            intermediate_size=11 * width // 4,
            num_hidden_layers=layers,
            num_attention_heads=width // head,
            num_key_value_heads=width // head,
            max_position_embeddings=4096,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=width // 2,
            num_hidden_layers=layers,
            num_attention_heads=width // 128,
            image_size=pixels,
            patch_size=16,
            projection_dim=width,
            num_image_tokens=side**2,
        ),
        vq_config=JanusVQVAEConfig(
            base_channels=32,
            latent_channels=32,
            channel_multiplier=[1] * 5,
            num_res_blocks=1,
            projection_dim=width,
            image_token_embed_dim=width,
        ),
        image_token_id=tokenizer.image_token_id,
    )
    images = JanusImageProcessorPil(
        size={"height": pixels, "width": pixels}, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_size=14
    )
    processor = JanusProcessor(
        image_processor=images, tokenizer=tokenizer, chat_template=tiny_janus.CHAT_TEMPLATE, num_image_tokens=side**2
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = JanusForConditionalGeneration(config).to(dtype)
    model.model.vqmodel.float()  # as `from_pretrained` loads it
    return JanusBackbone(model, processor)


def bagel(
    width: int,
    layers: int,
    side: int = 2,
    head: int = 64,
    share: int = 4,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> BagelBackbone:
    """Reads 336 x 336 pixels as 24 x 24 patches, by a vision tower of half the language model's width.

    Args:
        side: rows and columns of the latent tokens that it draws, 16 x 16 pixels each.
        head: width of an attention head.
        share: query heads of a key-value head.
    """
    tokenizer = tiny_bagel.build_tokenizer()
    heads = width // head
    config = BagelConfig(
        LanguageConfig(width, 11 * width // 4, layers, heads, heads // share, len(tokenizer)),
        VisionConfig(hidden=width // 2, intermediate=2 * width, layers=layers, heads=width // 128, patch=14, side=24),
        latent_patch=tiny_bagel.LATENT_PATCH,
        latent_channels=CHANNELS,
        latent_side=max(8, side),
    )
    settings = InputSettings(longest=336, drawn=(16 * side, 16 * side))
    with tempfile.TemporaryDirectory() as folder:
        save_vae(build_vae(0), Path(folder))
        vae = FluxVae.from_folder(Path(folder), torch.device(device))
    model = tiny_bagel.random_model(config, 0).to(device, dtype)
    return BagelBackbone(model, vae, tokenizer, settings, torch.device(device))
