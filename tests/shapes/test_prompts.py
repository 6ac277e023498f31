"""Prompts: GenEval's schema, satisfiable, held-out combinations really held out, wrong captions really wrong."""

import random
from collections import Counter

import pytest

from unified_rl.shapes import prompts
from unified_rl.shapes.prompts import CATEGORIES, all_metadata, caption_pairs, prompt_records, scene_for, split_metadata
from unified_rl.shapes.world import is_correct, render, scene_satisfies


def test_number_of_combinations():
    counts = {tag: len(items) for tag, items in all_metadata().items()}
    assert counts == {
        "single_object": 6, "two_object": 30, "counting": 18, "colors": 36, "position": 120, "color_attr": 900,
    }  # fmt: skip


@pytest.mark.parametrize("tag", CATEGORIES)
def test_a_scene_made_for_a_prompt_satisfies_it(tag):
    rng = random.Random(tag)
    for metadata in all_metadata()[tag]:
        assert is_correct(render(scene_for(metadata, rng)), metadata)


def test_metadata_has_genevals_fields():
    for tag, items in all_metadata().items():
        for metadata in items:
            assert metadata["tag"] == tag
            assert set(metadata) <= {"tag", "include", "exclude", "prompt"}
            for clause in metadata["include"]:
                assert {"class", "count"} <= set(clause) <= {"class", "count", "color", "position"}


def test_held_out_combinations_do_not_occur_in_training():
    train, held_out = split_metadata("train"), split_metadata("heldout")
    for tag in CATEGORIES:
        a, b = ({m["prompt"] for m in split[tag]} for split in (train, held_out))
        assert not a & b
        assert a | b == {m["prompt"] for m in all_metadata()[tag]}
        assert len(b) == max(1, round(0.3 * len(a | b)))


@pytest.mark.parametrize(("split", "expected"), [("train", prompts.TRAIN_PROMPTS), ("heldout", None)])
def test_records_are_balanced_and_unique(split, expected):
    records = prompt_records(split)
    assert len({r.prompt_id for r in records}) == len(records)
    counts = Counter(r.metadata["tag"] for r in records)
    assert counts == (expected or dict.fromkeys(CATEGORIES, prompts.HELD_OUT_PROMPTS))
    assert [r.text for r in records] == [r.metadata["prompt"] for r in records]


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="neither train nor heldout"):
        prompt_records("test")


def test_caption_pairs_differ_in_one_word_and_the_wrong_one_is_false():
    by_prompt = {m["prompt"]: m for items in all_metadata().values() for m in items}
    for scene, true, wrong, tag in caption_pairs(3, 300):
        differing = [a != b for a, b in zip(true.split(), wrong.split(), strict=True)]
        assert sum(differing) == 1
        assert scene_satisfies(scene, by_prompt[true])
        assert not scene_satisfies(scene, by_prompt[wrong])
        assert by_prompt[true]["tag"] == tag
    assert caption_pairs(3, 12) == caption_pairs(3, 12) != caption_pairs(4, 12)
