"""The reading path against the backbone that sampled, without an engine."""

import numpy as np
import pytest
import torch

from unified_rl.backbones.bagel.backbone import BagelBackbone
from unified_rl.backbones.base import Categorical
from unified_rl.backbones.janus import JanusBackbone
from unified_rl.train.reading import ReadingPath

IMAGES = [np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8) for i in range(2)]
QUESTIONS = ["What is it?", "two rings"]
TEMPERATURE = 0.8


def load(family, folder):
    """A backbone with a Solver's adapter that is not zero."""
    backbone = {"janus": JanusBackbone, "bagel": BagelBackbone}[family].from_pretrained(folder)
    backbone.add_lora(4, 8, "solver")
    generator = torch.Generator().manual_seed(0)
    for name in backbone.trainable_names("lora"):
        parameter = backbone.model.get_parameter(name)
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        parameter.requires_grad_()
    return backbone


@pytest.fixture(params=["janus", "bagel"])
def family(request):
    return request.param


@pytest.fixture
def folder(family, request):
    return request.getfixturevalue(f"random_{family}_folder")


def test_sampled_texts_are_replayed_and_compared_with_the_base_model(family, folder):
    backbone = load(family, folder)
    drawn = backbone.rollout_text(IMAGES, QUESTIONS, [1, 2], 5, TEMPERATURE)
    inputs = IMAGES, QUESTIONS, drawn.ids, drawn.mask
    log_probs, kl, entropy = ReadingPath(backbone)(*inputs, TEMPERATURE)
    inside = drawn.mask > 0
    torch.testing.assert_close(log_probs[inside], drawn.log_probs[inside], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(entropy[inside], drawn.entropies[inside], atol=1e-4, rtol=1e-4)
    base = {"janus": JanusBackbone, "bagel": BagelBackbone}[family].from_pretrained(folder)
    ours, theirs = (Categorical(of.answer_logits(*inputs) / TEMPERATURE) for of in (backbone, base))
    expected = ours.kl(theirs)
    torch.testing.assert_close(kl[inside], expected[inside], atol=1e-5, rtol=1e-4)
    assert kl[inside].min() > 1e-4 and log_probs.requires_grad and kl.requires_grad and not entropy.requires_grad


def test_recomputed_activations_meet_the_same_adapter(family, folder):
    gradients = []
    for recompute in (False, True):
        backbone = load(family, folder)
        drawn = backbone.rollout_text(IMAGES, QUESTIONS, [1, 2], 5, TEMPERATURE)
        if recompute:
            backbone.enable_activation_checkpointing()
        log_probs, kl, _ = ReadingPath(backbone)(IMAGES, QUESTIONS, drawn.ids, drawn.mask, TEMPERATURE)
        ((log_probs + kl) * drawn.mask).sum().backward()
        gradients.append([backbone.model.get_parameter(name).grad for name in backbone.trainable_names("lora")])
    assert all(bool(g.any()) for g in gradients[0])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, atol=1e-5, rtol=1e-4)


def test_path_holds_what_reads_and_nothing_that_draws(family, folder):
    backbone = load(family, folder)
    kept = {id(p) for p in ReadingPath(backbone).parameters()}
    named = dict(backbone.model.named_parameters())
    left = {name for name, parameter in named.items() if id(parameter) not in kept}
    assert all(id(named[name]) in kept for name in backbone.trainable_names("lora"))
    drawing = ("_moe_gen", "vae2llm", "generation_head", "vqmodel")
    assert left and all(name not in left for name in named if "lm_head" in name)
    assert all(name in left for name in named if any(part in name for part in drawing))
