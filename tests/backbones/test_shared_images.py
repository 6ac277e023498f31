"""Several questions on one image, which is read once; and embeddings. On both families with random weights."""

import numpy as np
import pytest
import torch

from unified_rl.backbones.bagel.backbone import BagelBackbone
from unified_rl.backbones.bagel.context import Context
from unified_rl.backbones.bagel.sequence import Text, pack
from unified_rl.backbones.base import BackboneError, distinct_images, embedding
from unified_rl.backbones.janus import JanusBackbone

QUESTIONS = ["What is it?", "yes no", "a red circle", "two rings left of a blue square", "Plan it first.", "no"]
TEXTS = ["two rings", "a blue square", "yes", "a red circle", "no", "two rings"]


@pytest.fixture(params=["janus", "bagel"], scope="module")
def backbone(request, random_janus_folder, random_bagel_folder):
    if request.param == "janus":
        return JanusBackbone.from_pretrained(random_janus_folder)
    return BagelBackbone.from_pretrained(random_bagel_folder)


def picture(height=32, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pictures():
    """Two pictures of different sizes, one of them twice as one array and once as a copy, and rows without any."""
    one, two = picture(), picture(16, 24, 1)
    return [one, None, one.copy(), two, one, None]


def seen_pictures(backbone, monkeypatch, call):
    """How many pictures the vision tower sees in each of its calls."""
    tower = backbone.model.model.vision_model if backbone.family == "janus" else backbone.model.vit_model
    seen, forward = [], tower.forward

    def counted(*args, **kwargs):
        seen.append(len(args[0] if args else kwargs["pixel_values"]))
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tower, "forward", counted)
        call()
    return seen


def test_pictures_are_the_same_by_identity_or_bytes():
    one = picture()
    turned = one.transpose(1, 0, 2)
    rows = [None, one, one.copy(), turned, None, one, one.reshape(16, 64, 3)]
    assert distinct_images(rows) == ([1, 3, 6], [-1, 0, 0, 1, -1, 0, 2])
    assert distinct_images([None]) == ([], [-1])
    # Rows of one array are new objects each time, of which two may have had the same identity.
    whole = np.random.default_rng(0).integers(0, 255, (8, 8, 8, 3)).astype(np.uint8)
    assert distinct_images(whole) == (list(range(8)), list(range(8)))
    with pytest.raises(BackboneError, match="image 1 must be a uint8"):
        distinct_images([one, np.zeros((3, 3))])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_on_a_shared_image_are_those_on_it_alone(backbone, temperature):
    seeds = list(range(6))
    together = backbone.rollout_text(pictures(), QUESTIONS, seeds, 8, temperature)
    for row in range(6):
        alone = backbone.rollout_text([pictures()[row]], [QUESTIONS[row]], [seeds[row]], 8, temperature)
        length = int(alone.mask.sum())
        assert together.mask[row].sum() == length
        assert torch.equal(together.ids[row, :length], alone.ids[0, :length])
        assert (together.log_probs[row, :length] - alone.log_probs[0, :length]).abs().max() < 1e-4
        assert (together.entropies[row, :length] - alone.entropies[0, :length]).abs().max() < 1e-4
        assert together.texts[row] == alone.texts[0]
    other = [picture(seed=7) if image is not None and len(image) == 32 else image for image in pictures()]
    changed = backbone.rollout_text(other, QUESTIONS, seeds, 8, temperature)
    moved = (changed.log_probs[:, 0] - together.log_probs[:, 0]).abs() > 1e-3
    assert moved.tolist() == [True, False, True, False, True, False]


@pytest.mark.parametrize("end", [False, True])
def test_scores_on_a_shared_image_are_those_with_gradients(backbone, end):
    texts = [*TEXTS[:4], "", *TEXTS[5:]]
    expected = backbone.text_logps(pictures(), QUESTIONS, texts, end_of_turn=end)  # every row by itself
    with torch.no_grad():
        shared = backbone.text_logps(pictures(), QUESTIONS, texts, end_of_turn=end)
        single = backbone.text_logps([picture()] * 2, QUESTIONS[:2], ["yes"] * 2, end_of_turn=end)
    assert torch.equal(shared.ids, expected.ids)
    assert torch.equal(shared.mask, expected.mask)
    assert (shared.log_probs - expected.log_probs).abs().max() < 1e-4
    again = backbone.text_logps([picture()] * 2, QUESTIONS[:2], ["yes"] * 2, end_of_turn=end)
    assert (single.log_probs - again.log_probs).abs().max() < 1e-4


def test_logits_and_gradients_on_a_shared_image_are_those_on_it_alone(random_janus_folder, monkeypatch):
    backbone = JanusBackbone.from_pretrained(random_janus_folder)
    layers = backbone.model.model.language_model.layers
    weights = [layers[0].self_attn.k_proj.weight, layers[0].mlp.up_proj.weight, layers[-1].self_attn.v_proj.weight]
    for weight in weights:
        weight.requires_grad_()
    images = [picture(), picture().copy(), picture(16, 24, 1)]
    ids, mask = torch.tensor([[3, 4, 5], [6, 7, 8], [9, 0, 0]]), torch.tensor([[1.0] * 3, [1.0] * 3, [1.0, 0, 0]])

    def run(rows):
        inputs = [images[i] for i in rows], [QUESTIONS[i] for i in rows], ids[rows], mask[rows]
        logits = backbone.answer_logits(*inputs) * inputs[-1][..., None]
        return logits, torch.autograd.grad(logits.log_softmax(-1)[..., 5].sum(), weights)

    together, gradients = run([0, 1, 2])
    alone = [run([row]) for row in range(3)]
    assert torch.allclose(together, torch.cat([logits for logits, _ in alone]), atol=1e-4)
    for i, gradient in enumerate(gradients):
        assert torch.allclose(gradient, sum(single[i] for _, single in alone), atol=1e-4, rtol=1e-3)
        assert gradient.abs().max() > 1e-3
    assert seen_pictures(backbone, monkeypatch, lambda: run([0, 1, 2])) == [2]


def test_an_image_is_read_once(backbone, monkeypatch):
    calls = (
        lambda: backbone.rollout_text(pictures(), QUESTIONS, [0] * 6, 2, 0.0),
        lambda: backbone.text_logps(pictures(), QUESTIONS, TEXTS),
        lambda: backbone.embed(pictures(), TEXTS),
    )
    with torch.no_grad():
        assert [seen_pictures(backbone, monkeypatch, call) for call in calls] == [[2]] * 3
    assert seen_pictures(backbone, monkeypatch, calls[1]) == [4]


def test_the_system_text_belongs_to_what_is_shared(random_bagel_folder):
    backbone = BagelBackbone.from_pretrained(random_bagel_folder)
    together = backbone.rollout_text(pictures(), QUESTIONS, [0] * 6, 4, 0.0, system="Plan it first.")
    for row in range(6):
        alone = backbone.rollout_text(pictures()[row : row + 1], [QUESTIONS[row]], [0], 4, 0.0, system="Plan it first.")
        assert torch.equal(alone.ids[0], together.ids[row, : alone.ids.shape[1]])


def test_cut_prompts_have_the_tokens_of_whole_ones(random_janus_folder):
    inputs = JanusBackbone.from_pretrained(random_janus_folder).inputs
    whole, whole_mask, _ = inputs.reading(pictures(), QUESTIONS)
    starts, pixels, rows, ids, mask = inputs.shared_reading(pictures(), QUESTIONS)
    assert pixels.shape == (2, 3, 32, 32)
    assert rows.tolist() == [0, -1, 0, 1, 0, -1]
    for row, place in enumerate(rows.tolist()):
        start = starts[place].tolist() if place >= 0 else []
        assert start + ids[row][mask[row] == 1].tolist() == whole[row][whole_mask[row] == 1].tolist()
        assert mask[row].tolist() == sorted(mask[row].tolist())  # padded on the left


# ---- embeddings ---------------------------------------------------------------------------------------------------


def whole_states(backbone, image, text):
    """Last hidden states of a text's tokens, from one forward over the whole row."""
    inputs = backbone.inputs
    if backbone.family == "bagel":
        answer = inputs.ids(text)
        row = [*inputs.reading([image], [""])[0], Text([inputs.special.text_start, *answer])]
        hidden, _ = backbone.model(pack([row], backbone.model.config, inputs.special), Context.empty(1))
        return hidden.understanding[-len(answer) :]
    ids, _, pixels = inputs.reading([image], [""])
    answer, _ = inputs.responses([text], end_of_turn=False)
    hidden = backbone.model.model(input_ids=torch.cat([ids, answer], 1), pixel_values=pixels).last_hidden_state
    return hidden[0, -answer.shape[1] :]


@torch.no_grad()
def test_an_embedding_is_the_mean_of_the_texts_states(backbone):
    found = backbone.embed(pictures(), TEXTS)
    assert found.dtype == torch.float32
    assert torch.allclose(found.norm(dim=1), torch.ones(6))
    for row, (image, text) in enumerate(zip(pictures(), TEXTS, strict=True)):
        mean = whole_states(backbone, image, text).mean(0)
        assert (found[row] - mean / mean.norm()).abs().max() < 1e-4
        assert (backbone.embed([image], [text])[0] - found[row]).abs().max() < 1e-4


def test_an_embedding_depends_on_image_and_text(backbone):
    text = "two rings"
    one, other, copied, none, said = backbone.embed(
        [picture(), picture(seed=7), picture().copy(), None, None], [text, text, text, text, "yes"]
    )
    assert (one - copied).abs().max() < 1e-6
    for pair in ((one, other), (one, none), (other, none), (none, said)):
        assert torch.dot(*pair) < 1 - 1e-4


def test_embeddings_by_hand():
    states = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]], [[0.0, 2.0], [5.0, 5.0], [5.0, 5.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.allclose(embedding(states, mask), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    with pytest.raises(BackboneError, match="text 1 is empty"):
        embedding(states, torch.tensor([[1, 1, 0], [0, 0, 0]]))
