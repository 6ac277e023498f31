"""The judge of drawing tasks with the tiny Janus: drawings that fit their task earn more than those of another."""

import math
import random
import statistics
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from unified_rl.backbones.load import load_backbone
from unified_rl.config import BackboneConfig, SelfConsistencyConfig
from unified_rl.records import PromptRecord
from unified_rl.reward import drawings
from unified_rl.reward.drawings import FidelityJudge, likelihoods
from unified_rl.reward.gvu import GvuScore, gvu_scores
from unified_rl.reward.self_consistency_prompts import caption_question
from unified_rl.reward.skips import Skipped, SkipReason
from unified_rl.reward.solver import write
from unified_rl.shapes.prompts import prompt_records, scene_for
from unified_rl.shapes.proposing import stated_facts
from unified_rl.shapes.world import render

SETTINGS = SelfConsistencyConfig(wording="brief", solver_tokens=8, caption_tokens=24)


@pytest.fixture(scope="module")
def backbone():
    config = BackboneConfig(path="assets:tiny_janus", dtype="float32", attn_implementation="sdpa", device="cpu")
    return load_backbone(config)


@pytest.fixture(scope="module")
def tasks():
    """True pictures with tasks that they fulfil."""
    made = []
    for prompt in prompt_records("train")[8::24]:
        pairs = [list(pair) for pair in stated_facts(prompt.metadata)][:3]
        metadata = {"image_id": prompt.prompt_id, "quality": 1.0, "pairs": pairs}
        image = render(scene_for(prompt.metadata, random.Random(1)))
        made.append((image, PromptRecord(prompt.prompt_id, prompt.text, metadata)))
    return made


def scores(judge, images, tasks):
    return judge.score(images, [task for _, task in tasks], list(range(len(images))))


def test_shuffled_pairs_of_image_and_task_score_lower(backbone, tasks):
    judge, images = FidelityJudge(backbone, SETTINGS, None), [image for image, _ in tasks]
    matched, shuffled = scores(judge, images, tasks), scores(judge, images[5:] + images[:5], tasks)
    both = [(m, s) for (m, _), (s, _) in zip(matched, shuffled, strict=True) if not isinstance(m, Skipped)]
    assert len(both) > len(tasks) / 2
    assert statistics.fmean(m for m, _ in both) > statistics.fmean(s for _, s in both if not isinstance(s, Skipped))
    for part in ("fidelity", "caption_similarity", "image_similarity"):
        means = [
            statistics.fmean(parts[part] for reward, parts in made if not isinstance(reward, Skipped))
            for made in (matched, shuffled)
        ]
        assert means[0] > means[1], part


def test_the_image_decides_its_own_similarity(backbone, tasks):
    judge = FidelityJudge(backbone, SETTINGS, None)
    images, prompts = [image for image, _ in tasks[:4]], [tasks[0][1].text] * 4
    similarities = judge._similarities(images, prompts)[1]
    assert len(set(similarities)) == 4
    assert judge._similarities([images[0]] * 2, prompts[:2])[1] == pytest.approx([similarities[0]] * 2, abs=1e-5)


def test_the_prompts_likelihood_in_the_place_of_its_cosine(backbone, tasks):
    settings = replace(SETTINGS, image_term="likelihood")
    images, prompts = [image for image, _ in tasks], [task.text for _, task in tasks]
    captions, cosines = FidelityJudge(backbone, SETTINGS, None)._similarities(images, prompts)
    same_captions, matched = FidelityJudge(backbone, settings, None)._similarities(images, prompts)
    assert same_captions == captions and matched != cosines
    expected = [s.geometric_mean for s in gvu_scores(backbone, images, prompts, caption_question("brief"))]
    assert matched == pytest.approx(expected, abs=1e-6)
    shuffled = FidelityJudge(backbone, settings, None)._similarities(images[5:] + images[:5], prompts)[1]
    assert statistics.fmean(m > s for m, s in zip(matched, shuffled, strict=True)) > 0.95


def test_a_caption_without_a_word_is_skipped(backbone, tasks, monkeypatch):
    images, prompts = [image for image, _ in tasks[:3]], [task.text for _, task in tasks[:3]]
    written = FidelityJudge(backbone, SETTINGS, None)._similarities(images, prompts)[0]
    texts = write(backbone, images, [caption_question("brief")] * 3, [0] * 3, SETTINGS.caption_tokens, 0.0).traj.texts
    silent = SimpleNamespace(traj=SimpleNamespace(texts=[texts[0], " ", texts[2]]))
    monkeypatch.setattr(drawings, "write", lambda *_: silent)
    near = FidelityJudge(backbone, SETTINGS, None)._similarities(images, prompts)[0]
    assert near[1] == Skipped(SkipReason.EMPTY_REPLY, "the caption")
    assert [near[0], near[2]] == pytest.approx([written[0], written[2]], abs=1e-6)


def test_a_likelihood_that_is_no_number_is_a_failed_score():
    good, bad = GvuScore(["a"], torch.tensor([-1.0]), -1.0), GvuScore(["a"], torch.tensor([math.nan]), math.nan)
    assert likelihoods([good]) == [math.exp(-1.0)]
    assert likelihoods([bad, good])[0].reason is SkipReason.BAD_SIMILARITY
    assert likelihoods([replace(good, tokens=[])])[0].reason is SkipReason.BAD_SIMILARITY


def test_sampled_answers_share_the_vote(backbone, tasks):
    settings = SelfConsistencyConfig(wording="brief", solver_tokens=8, caption_tokens=24, fidelity_samples=3)
    made = scores(FidelityJudge(backbone, settings, None), [image for image, _ in tasks[:4]], tasks[:4])
    again = FidelityJudge(backbone, settings, None).score([tasks[3][0]], [tasks[3][1]], [3])
    assert made[3][0] == pytest.approx(again[0][0], abs=1e-5)


def test_release_pays_for_variety(backbone, tasks):
    settings = SelfConsistencyConfig(
        preset="self_consistency_release", wording="brief", solver_tokens=8, caption_tokens=24
    )
    task = tasks[0][1]
    images = [tasks[0][0], tasks[0][0], np.full_like(tasks[0][0], 255)]
    made = FidelityJudge(backbone, settings, None).score(images, [task] * 3, [0, 1, 2])
    assert [parts["diversity"] for reward, parts in made if not isinstance(reward, Skipped)][-1] == 1.0
