"""The public Janus-Pro-1B configuration, without its weights."""

import pytest
import torch
from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from unified_rl.backbones.base import Sampling, TokenTraj
from unified_rl.backbones.janus import JanusBackbone, JanusForConditionalGeneration


def janus_pro_1b() -> JanusConfig:
    """Sizes of deepseek-community/Janus-Pro-1B."""
    return JanusConfig(
        text_config=LlamaConfig(
            vocab_size=102400,
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=24,
            num_attention_heads=16,
            num_key_value_heads=16,
            max_position_embeddings=16384,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=384,
            patch_size=16,
            mlp_ratio=4.0,
            projection_dim=2048,
            depth=2,
            num_image_tokens=576,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=16384,
            latent_channels=256,
            base_channels=128,
            channel_multiplier=[1, 1, 2, 2, 4],
            num_res_blocks=2,
            projection_dim=2048,
            num_hidden_layers=2,
            image_token_embed_dim=2048,
        ),
        image_token_id=100581,
        tie_word_embeddings=False,
    )


@pytest.fixture
def on_meta(random_janus_folder):
    with torch.device("meta"):
        model = JanusForConditionalGeneration(janus_pro_1b())
    return JanusBackbone(model, JanusBackbone.from_pretrained(random_janus_folder).processor)


def count(backbone, names=None, under=""):
    return sum(
        p.numel() for n, p in backbone.model.named_parameters() if n.startswith(under) and (names is None or n in names)
    )


def test_parameter_accounting(on_meta):
    assert count(on_meta) == pytest.approx(2.077e9, abs=0.5e6)
    assert count(on_meta, under="model.language_model.") == pytest.approx(1.443e9, abs=0.5e6)
    assert count(on_meta, under="model.vision_model.") == pytest.approx(0.304e9, abs=0.5e6)
    assert count(on_meta, under="model.vqmodel.") == pytest.approx(0.072e9, abs=0.5e6)
    assert count(on_meta, under="lm_head.") == 102400 * 2048
    assert (on_meta.image_tokens, on_meta.image_size) == (576, 384)


def test_trained_in_full(on_meta):
    """Layers, norm, image embeddings, aligner and head; by hand."""
    layers = 24 * (4 * 2048**2 + 3 * 2048 * 5632 + 2 * 2048) + 2048
    drawing = 16384 * 8 + (8 * 2048 + 2048) + 2 * (2048**2 + 2048) + (2048 * 16384 + 16384)
    assert count(on_meta, on_meta.trainable_names("full")) == layers + drawing
    assert layers + drawing == 1_275_338_752


def test_trained_with_lora(on_meta):
    on_meta.add_lora(32, 64)
    per_layer = 32 * (4 * (2048 + 2048) + 3 * (2048 + 5632))
    assert count(on_meta, on_meta.trainable_names("lora")) == 24 * per_layer == 30_277_632
    assert count(on_meta) == pytest.approx(2.077e9 + 30.3e6, abs=1e6)


def test_load_draw_and_read_at_the_public_grid(janus_builder, tmp_path):
    """One thin layer behind the real grid, vocabulary and codebook: 576 tokens, 384 x 384 pixels, 16384 codes."""
    janus_builder(tmp_path, side=24, patch=16, width=32, codes=16384, vocab_size=102400, num_hidden_layers=1)
    backbone = JanusBackbone.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert (backbone.image_tokens, backbone.image_size) == (576, 384)
    sampling = Sampling(guidance_scale=5.0)
    trajectory = backbone.rollout_images(["a corgi on a skateboard", "rain"], [1, 2, 3, 4], sampling)
    assert trajectory.actions.shape == (4, 576)
    assert trajectory.actions.max() > 8192
    assert trajectory.log_probs.isfinite().all()
    two = TokenTraj(trajectory.actions[[0, 2]], trajectory.log_probs[[0, 2]])
    part = backbone.image_dist(
        ["a corgi on a skateboard", "rain"],
        two,
        sampling,
        [0, 300, 575],
    )
    assert part.logits.shape == (2, 3, 16384)
    images = backbone.decode(TokenTraj(trajectory.actions[:1], trajectory.log_probs[:1]))
    assert images.shape == (1, 384, 384, 3)
    score = backbone.text_logps([images[0]], ["Describe the image in detail."], ["rain"])
    assert score.log_probs.isfinite().all()
