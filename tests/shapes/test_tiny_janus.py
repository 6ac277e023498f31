"""The shipped tiny Janus: size, layout, and the abilities that it is meant to have; and how it is made."""

import json
import random

import pytest
import torch
from safetensors import safe_open
from transformers import AutoProcessor, JanusForConditionalGeneration

from unified_rl.backbones.base import Sampling, TokenTraj
from unified_rl.backbones.janus import JanusBackbone
from unified_rl.config import ASSETS
from unified_rl.shapes import measure, train_janus, train_vision, train_vq, training
from unified_rl.shapes.questions import EASY, HARD
from unified_rl.shapes.tiny_janus import CODES, build_checkpoint
from unified_rl.shapes.vocabulary import DESCRIBE
from unified_rl.shapes.world import Object, render

FOLDER = ASSETS / "tiny_janus"


@pytest.fixture(scope="module")
def backbone():
    return JanusBackbone.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrained")
    build_checkpoint(folder, seed=3)
    return folder


def test_size_precision_and_layout():
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) <= 12 * 2**20
    with safe_open(FOLDER / "model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float16}  # noqa: SIM118
    assert json.loads((FOLDER / "config.json").read_text())["architectures"] == ["JanusForConditionalGeneration"]
    assert (FOLDER / "training.log").stat().st_size > 1000


def test_transformers_own_classes_load_it():
    model, info = JanusForConditionalGeneration.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(info.values())
    processor = AutoProcessor.from_pretrained(FOLDER)
    inputs = processor(text=["a photo of a red circle"], generation_mode="image", return_tensors="pt")
    tokens = model.generate(**inputs, generation_mode="image", guidance_scale=5.0, do_sample=True, top_k=0)
    assert tokens.shape == (1, 16)


def test_it_reads_better_than_it_draws(backbone):
    torch.set_num_threads(1)
    drawn = measure.drawing(backbone, 4, Sampling())
    answered = {family: sum(measure.answer_family(backbone, 7, family, 100)) / 100 for family in (*EASY, *HARD)}
    assert sum(measure.rank_captions(backbone, 7, 300)) / 300 >= 0.95
    overall = sum(drawn.values()) / 6
    assert 0.25 <= overall <= 0.60
    assert max(drawn.values()) < 0.95  # room in every category
    assert sum(answered[f] for f in EASY) / len(EASY) >= 0.90
    assert 0.55 <= sum(answered[f] for f in HARD) / len(HARD) <= 0.90


def test_it_is_a_judge_of_scenes_and_of_its_own_drawings(backbone):
    torch.set_num_threads(1)
    pictures, metadata = measure.drawings(backbone, 1, Sampling())
    for values in (measure.ratings_of_scenes(backbone, 7, 200), measure.judging(backbone, pictures, metadata)):
        assert values["parsed"] >= 0.99
        assert values["regions"] >= 0.85
        assert values["layout"] >= 0.80


def test_it_proposes_questions_and_drawing_tasks(backbone):
    torch.set_num_threads(1)
    proposed = measure.proposing(backbone, 7, 64)
    assert proposed["questions"] >= 0.95
    assert proposed["tasks"] >= 0.60
    assert proposed["true_tasks"] >= 0.40


def test_the_image_tokenizer_loses_nothing(backbone):
    assert train_vq.reconstruction_accuracy(backbone.model.model.vqmodel, seed=99, count=100) >= 0.97
    pictures = train_vq.random_pictures(random.Random(5), 64)
    codes = train_vq.true_codes(pictures)
    for images in (pictures, backbone.decode(TokenTraj(codes, torch.zeros(codes.shape)))):
        with torch.no_grad():
            found = train_vq.similarities(backbone.model.model.vqmodel, train_vq.to_pixels(images)).argmax(-1)
        assert torch.equal(found, codes)


def test_every_patch_has_a_code_of_its_own():
    scene = (Object("circle", "red"), None, None, Object("circle", "red"))
    codes = train_vq.true_codes(render(scene)[None]).view(4, 4)
    assert len(train_vq.patch_codes()) == CODES
    assert torch.equal(codes[:2, :2], codes[2:, 2:])
    assert len({*codes[:2, :2].flatten().tolist(), codes[0, 2].item()}) == 5
    assert (codes[:2, 2:] == codes[0, 2]).all()


def test_codes_that_look_alike_start_alike(untrained):
    model = JanusBackbone.from_pretrained(untrained).model.model
    train_vq.start_codes_alike(model, seed=0)
    red, also_red, blue = (
        train_vq.true_codes(render((Object(shape, color), None, None, None))[None])[0, 0]
        for shape, color in (("circle", "red"), ("square", "red"), ("square", "blue"))
    )
    for rows in (model.generation_embeddings.weight, model.generation_head.vision_head.weight):
        alike = torch.cosine_similarity(rows[red], rows[also_red], dim=0)
        assert alike > 0.5
        assert alike > torch.cosine_similarity(rows[red], rows[blue], dim=0) + 0.3


def test_the_same_seed_builds_the_same_checkpoint(untrained, tmp_path):
    build_checkpoint(tmp_path, seed=3)
    assert (tmp_path / "model.safetensors").read_bytes() == (untrained / "model.safetensors").read_bytes()
    assert (tmp_path / "tokenizer.json").read_bytes() == (untrained / "tokenizer.json").read_bytes()


def test_each_part_of_the_training_learns(untrained):
    torch.set_num_threads(1)
    lines = []
    backbone = JanusBackbone.from_pretrained(untrained)
    inner = backbone.model.model
    train_janus.name_patches(backbone, 0, lines.append, steps=60)
    assert float(lines[-1].split()[-1]) > 0.5  # patches with the right shape; chance is a sixth
    train_vq.train_vq(inner.vqmodel, 0, lines.append, steps=40)
    norms = inner.vqmodel.quantize.embedding.weight.norm(dim=1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)
    image_tokenizer = {k: v.clone() for k, v in inner.vqmodel.state_dict().items()}
    phase = training.Phase(steps=12, drawings=8, captions=4, questions=4, tables=2, lookups=2)
    settings = training.Settings(phases=(phase,), learning_rate=2e-3, warmup=2)
    rng = random.Random(0)
    before = [loss.item() for loss in train_janus.losses(backbone, settings, phase, rng).values()]
    train_janus.train_joint(backbone, settings, lines.append)
    after = [loss.item() for loss in train_janus.losses(backbone, settings, phase, rng).values()]
    assert after[1] < before[1] - 0.5
    assert after[0] < before[0]
    assert all(torch.equal(v, image_tokenizer[k]) for k, v in inner.vqmodel.state_dict().items())
    assert not any(p.requires_grad for p in backbone.model.parameters())


def test_a_batch_holds_what_the_settings_say():
    phase = training.Phase(steps=1, captions=3, questions=5, tables=2, lookups=1)
    settings = training.Settings(hidden_drawing_captions=1.0)
    images, questions, answers = training.reading_batch(settings, phase, random.Random(1))
    assert len(images) == len(questions) == len(answers) == 11
    assert questions[:3] == [DESCRIBE] * 3
    prompts, pictures, hidden = training.drawing_batch(settings, 4, random.Random(1))
    assert (len(prompts), pictures.shape, hidden) == (4, (4, 32, 32, 3), [True] * 4)


def test_learning_rate_by_hand():
    settings = training.Settings(learning_rate=1.0, warmup=10, decay=0.5)
    rates = [training.learning_rate(settings, step, 100) for step in (1, 10, 50, 75, 100)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.0])


def test_patch_labels_by_hand():
    scene = (Object("circle", "red"), None, None, Object("ring", "blue"))
    colors, shapes = train_vision.patch_labels(scene, 8).reshape(2, 4, 4)
    assert colors.tolist() == [[0, 0, -1, -1]] * 2 + [[-1, -1, 2, 2]] * 2
    assert shapes.tolist() == [[0, 0, -1, -1]] * 2 + [[-1, -1, 5, 5]] * 2
