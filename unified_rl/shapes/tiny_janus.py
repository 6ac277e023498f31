"""The tiny Janus before training: configuration, tokenizer and processor, in Hugging Face layout.

The same class and file layout as the public checkpoints (`JanusForConditionalGeneration`), only smaller, so that
the code that loads it is the code that loads them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from unified_rl.shapes.vocabulary import corpus, train_bpe
from unified_rl.shapes.world import IMAGE_SIZE

TOKENS_A_SIDE = 4
PATCH = IMAGE_SIZE // TOKENS_A_SIDE
CODES = 145  # one for each distinct 8x8 patch of the world
HIDDEN = 160
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
IMAGE, IMAGE_START, IMAGE_END = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|User|>: ' if message['role'] == 'user' else '<|Assistant|>: ' }}"
    "{% for content in message['content'] %}"
    "{{ '" + IMAGE + "\n' if content['type'] == 'image' else content['text'] }}"
    "{% endfor %}"
    "{{ '\n\n' if message['role'] == 'user' else '" + EOS + "' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>:' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The world's words with Janus's special tokens; BOS is prepended, padding is on the left."""
    user, assistant = "<|User|>: ", "\n\n<|Assistant|>:"
    lines = corpus(f"{user}{{}}{assistant}", f"{user}\n{{}}{assistant}", "<|Assistant|>: {}")
    bpe = train_bpe(lines, [BOS, EOS, PAD, IMAGE, IMAGE_START, IMAGE_END])
    bpe.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE, "boi_token": IMAGE_START, "eoi_token": IMAGE_END},
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> JanusConfig:
    """Janus-Pro's architecture at width 160: about 2.7 M parameters."""
    return JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=416,
            num_hidden_layers=5,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        vision_config=JanusVisionConfig(
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
            mlp_ratio=2.0,
            projection_dim=HIDDEN,
            depth=2,
            num_image_tokens=TOKENS_A_SIDE**2,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=CODES,
            latent_channels=32,
            base_channels=32,
            channel_multiplier=[1, 1, 1, 1],  # three halvings: 8 pixels a token
            num_res_blocks=1,
            projection_dim=HIDDEN,
            num_hidden_layers=2,
            image_token_embed_dim=HIDDEN,
        ),
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )


def build_checkpoint(folder: Path, seed: int) -> None:
    """Write a randomly initialised checkpoint (fp32) with tokenizer and processor to `folder`."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = JanusForConditionalGeneration(build_config(tokenizer))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        top_k=0,
        guidance_scale=5.0,
        generation_kwargs={"boi_token_id": tokenizer.boi_token_id},
    )
    images = JanusImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_size=PATCH
    )
    processor = JanusProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
        num_image_tokens=TOKENS_A_SIDE**2,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
