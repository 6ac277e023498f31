"""The shipped tiny BAGEL: size, layout, and the abilities that it is meant to have; and how it is made."""

import random

import numpy as np
import pytest
import torch
from safetensors import safe_open

from unified_rl.backbones.bagel.backbone import BagelBackbone
from unified_rl.backbones.bagel.sequence import patchify
from unified_rl.backbones.bagel.vae import diffusers_name
from unified_rl.backbones.base import FlowTraj
from unified_rl.config import ASSETS
from unified_rl.shapes import measure, train_bagel, train_vae, train_vq
from unified_rl.shapes.questions import EASY
from unified_rl.shapes.tiny_bagel import build_checkpoint
from unified_rl.shapes.training import Phase

FOLDERS = [ASSETS / "tiny_bagel", ASSETS / "tiny_bagel_roles"]


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def backbone(request):
    return BagelBackbone.from_pretrained(request.param)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untrained")
    build_checkpoint(folder, seed=3)
    return folder


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_size_precision_and_layout(folder):
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 12 * 2**20
    for name in ("ema.safetensors", "ae.safetensors"):
        with safe_open(folder / name, "pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float16}  # noqa: SIM118
    assert (folder / "training.log").stat().st_size > 1000


def test_images_are_four_cells_of_the_world(backbone):
    assert backbone.grid == (2, 2)
    assert backbone.image_size == (32, 32)
    assert backbone.inputs.fitting_size(32, 32) == (32, 32)


def test_it_reads_better_than_it_draws(backbone):
    torch.set_num_threads(1)
    drawn = measure.drawing(backbone, 4, train_bagel.SAMPLING)
    answered = [sum(measure.answer_family(backbone, 7, family, 100)) / 100 for family in EASY]
    assert sum(measure.rank_captions(backbone, 7, 300)) / 300 >= 0.95
    assert 0.25 <= sum(drawn.values()) / 6 <= 0.60
    assert min(drawn.values()) > 0.05  # something to reinforce
    assert max(drawn.values()) < 0.95  # room in every category
    assert sum(answered) / 3 >= 0.90


def test_it_is_a_judge_of_scenes_and_of_its_own_drawings(backbone):
    torch.set_num_threads(1)
    pictures, metadata = measure.drawings(backbone, 1, train_bagel.SAMPLING)
    for values in (measure.ratings_of_scenes(backbone, 7, 200), measure.judging(backbone, pictures, metadata)):
        assert values["parsed"] >= 0.99
        assert values["regions"] >= 0.85
        assert values["layout"] >= 0.85


def test_the_one_with_roles_proposes():
    torch.set_num_threads(1)
    values = measure.proposing(BagelBackbone.from_pretrained(FOLDERS[1]), 7, 100)
    assert values["questions"] >= 0.95
    assert values["tasks"] >= 0.75


def test_the_autoencoder_loses_nothing(backbone):
    assert train_vae.reconstruction_accuracy(backbone.vae, 99, 200) >= 0.99
    assert train_vae.reconstruction_accuracy(backbone.vae, 99, 200, noise=0.15) >= 0.98
    pictures = train_vq.random_pictures(random.Random(5), 16)
    latents = train_vae.true_latents(pictures)
    assert (backbone.vae.encode(train_vq.to_pixels(pictures) / 2 + 0.5) - latents).abs().max() < 0.25
    none = torch.zeros(16, 0)
    tokens = patchify(latents, 2)
    decoded = backbone.decode(FlowTraj(tokens[:, None], none.long(), none, tokens))
    assert [train_vq.seen(image) for image in decoded] == [train_vq.seen(image) for image in pictures]


def test_latents_depend_on_their_own_pixels_only():
    vectors = train_vae.patch_vectors()
    assert vectors.square().mean().item() == pytest.approx(1, abs=1e-5)
    assert vectors.mean(0).abs().max() < 1e-4
    distances = torch.cdist(vectors, vectors) + 10 * torch.eye(len(vectors))
    assert distances.min() > 1
    pictures = train_vq.random_pictures(random.Random(1), 2)
    changed = pictures.copy()
    changed[0, :16, :16], changed[1, :16, :16] = pictures[1, :16, :16], pictures[0, :16, :16]
    latents, others = train_vae.true_latents(pictures), train_vae.true_latents(changed)
    assert torch.equal(others[:, :, :2, :2], latents[[1, 0], :, :2, :2])
    assert torch.equal(others[:, :, 2:], latents[:, :, 2:])


def test_names_of_the_autoencoder_are_the_public_ones(untrained):
    names = train_vae.build_vae(0).state_dict().keys()
    assert all(diffusers_name(train_vae.public_name(name, 4), 4) == name for name in names)
    assert train_vae.public_name("decoder.up_blocks.0.resnets.2.conv1.bias", 4) == "decoder.up.3.block.2.conv1.bias"
    with safe_open(untrained / "ae.safetensors", "pt") as tensors:
        assert tensors.get_slice("encoder.mid.attn_1.q.weight").get_shape() == [64, 64, 1, 1]


def test_words_numbers_and_labels_are_single_tokens(backbone):
    def pieces(text):
        return [backbone.tokenizer.decode(i) for i in backbone.inputs.ids(text)]

    reply = "Region 1\nObject: red circle\nScore: -0.9\nRegion 2"
    assert pieces(reply) == ["Region", " 1", "\nObject:", " red", " circle", "\nScore:", " -0.9", "\nRegion", " 2"]
    assert pieces('for "a photo of two rings": 1 (0, 3, 16, 32)')[-8:] == [
        " two", " rings", '":', " 1", " (0,", " 3,", " 16,", " 32)",
    ]  # fmt: skip
    assert backbone.tokenizer.decode(backbone.inputs.ids("x Ünïcode\t 12.5%")) == "x Ünïcode\t 12.5%"


def test_the_same_seed_builds_the_same_checkpoint(untrained, tmp_path):
    build_checkpoint(tmp_path, seed=3)
    for name in ("ema.safetensors", "ae.safetensors", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (untrained / name).read_bytes()


def test_each_part_of_the_training_learns(untrained):
    torch.set_num_threads(1)
    lines = []
    backbone = BagelBackbone.from_pretrained(untrained)
    train_bagel.name_patches(backbone, 0, lines.append, steps=40)
    assert float(lines[-1].split()[-1]) > 0.9  # patches with the right row; chance is a half
    vae = train_vae.build_vae(0)
    generator = torch.Generator().manual_seed(0)
    pictures = train_vq.random_pictures(random.Random(0), 8)
    before = [loss.item() for loss in train_vae.losses(vae, pictures, generator)]
    train_vae.train_vae(vae, 0, lines.append, steps=12)
    after = [loss.item() for loss in train_vae.losses(vae, pictures, generator)]
    assert all(b < a for a, b in zip(before, after, strict=True))
    phase = Phase(steps=12, drawings=8, captions=4, questions=4, tables=2, lookups=2, layouts=1, regions=2)
    settings = train_bagel.Settings(phases=(phase,), learning_rate=2e-3, warmup=2)
    before = {k: v.item() for k, v in train_bagel.losses(backbone, settings, phase, random.Random(0)).items()}
    tables = backbone.model.latent_pos_embed.pos_embed.clone()
    train_bagel.train_joint(backbone, settings, lines.append)
    after = {k: v.item() for k, v in train_bagel.losses(backbone, settings, phase, random.Random(0)).items()}
    assert all(after[name] < 0.9 * before[name] for name in ("drawing", "reading", "rating"))
    assert torch.equal(tables, backbone.model.latent_pos_embed.pos_embed)
    assert not any(p.requires_grad for p in backbone.model.parameters())


def test_copies_of_a_drawing_share_its_prompt_and_nothing_else(untrained):
    backbone = BagelBackbone.from_pretrained(untrained)
    pictures = np.concatenate([train_vq.random_pictures(random.Random(2), 1)] * 2)
    one, two = (train_bagel.Settings(copies=copies) for copies in (1, 2))
    prompts = ["a photo of a ring"]
    single = [
        train_bagel.drawing_loss(backbone, one, prompts * 2, pictures, [False] * 2, rng).item()
        for rng in (random.Random(0),)
    ]
    double = train_bagel.drawing_loss(backbone, two, prompts, pictures[:1], [False], random.Random(0)).item()
    assert double == pytest.approx(single[0], rel=1e-5)
