"""GvU's reward on the shipped checkpoint: equal to the product loop, sensitive to the picture, never a silent zero."""

import math
import random

import pytest
import torch

from unified_rl.backbones.janus import JanusBackbone
from unified_rl.config import ASSETS
from unified_rl.reward.gvu import GvuScore, gvu_scores
from unified_rl.shapes.prompts import random_metadata, scene_for
from unified_rl.shapes.world import render

QUESTION = "Describe the image in detail."


@pytest.fixture(scope="module")
def judge():
    return JanusBackbone.from_pretrained(ASSETS / "tiny_janus")


@pytest.fixture(scope="module")
def matched():
    rng = random.Random(0)
    metadata = [random_metadata(rng) for _ in range(32)]
    return [render(scene_for(m, rng)) for m in metadata], [m["prompt"] for m in metadata]


def product_loop(judge, image, prompt):
    """The paper's product, one forward per token through the model's own forward."""
    text = judge.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}],
        add_generation_prompt=True,
    )
    inputs = judge.processor(text=[text], images=[image], return_tensors="pt")
    ids = judge.tokenizer(f" {prompt}", add_special_tokens=False).input_ids
    product = 1.0
    with torch.no_grad():
        for token in ids:
            logits = judge.model(**inputs).logits[0, -1]
            product *= float(logits.softmax(-1)[token])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return product ** (1 / len(ids)), len(ids)


def test_one_forward_equals_the_product_loop(judge, matched):
    images, prompts = (part[:6] for part in matched)
    for score, image, prompt in zip(gvu_scores(judge, images, prompts, QUESTION), images, prompts, strict=True):
        expected, length = product_loop(judge, image, prompt)
        assert len(score.tokens) == len(score.token_log_probs) == length
        assert score.geometric_mean == pytest.approx(expected, rel=1e-5)
        assert "".join(score.tokens).strip() == prompt


def test_the_right_picture_scores_higher_than_another(judge, matched):
    images, prompts = matched
    right = [s.geometric_mean for s in gvu_scores(judge, images, prompts, QUESTION)]
    wrong = [s.geometric_mean for s in gvu_scores(judge, images[1:] + images[:1], prompts, QUESTION)]
    assert sum(right) / len(right) > 2 * sum(wrong) / len(wrong)


def test_a_long_improbable_prompt_does_not_underflow(judge, matched):
    prompt = " ".join(["zebra quilt xylophone"] * 30)
    (score,) = gvu_scores(judge, matched[0][:1], [prompt], QUESTION)
    assert sum(score.token_log_probs) < -750  # the plain product is zero in double precision
    assert 0 < score.geometric_mean < 0.1


def test_geometric_mean_by_hand():
    score = GvuScore(["a", "b"], torch.log(torch.tensor([0.5, 0.125])), math.log(0.25))
    assert score.geometric_mean == pytest.approx(math.sqrt(0.5 * 0.125))
