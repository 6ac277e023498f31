"""Prompts, questions and pictures as BAGEL reads them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.made_bagel import SPECIALS, build_tokenizer
from unified_rl.backbones.bagel.backbone import BagelBackbone
from unified_rl.backbones.bagel.inputs import THINK, BagelInputs, InputSettings
from unified_rl.backbones.bagel.sequence import Picture, SpecialTokens, Text
from unified_rl.backbones.base import BackboneError

SMALL = InputSettings(shortest=16, longest=32, drawn=(32, 48), think="Plan it first.")
BIG = np.zeros((40, 60, 3), dtype=np.uint8)


def made(settings=SMALL, patch=8, side=6):
    return BagelInputs(build_tokenizer(), settings, patch, side, torch.device("cpu"))


@pytest.fixture(scope="module")
def inputs():
    return made()


def spelt(inputs, text):
    """A text with its boundaries, token by token."""
    words = inputs.tokenizer.encode(text, add_special_tokens=False)
    start, end = (inputs.tokenizer.convert_tokens_to_ids(SPECIALS[i]) for i in (1, 2))
    return Text([start, *words, end])


def test_formats(inputs):
    assert inputs.drawing("a red circle") == [spelt(inputs, "a red circle")]
    planned = [spelt(inputs, text) for text in ("Plan it first.", "a red circle", "two rings")]
    assert inputs.drawing("a red circle", "two rings") == planned
    assert inputs.reading([None], ["yes"]) == [[spelt(inputs, "yes")]]
    first, second = inputs.reading([None, BIG], ["yes", "no"], "Plan it first.")
    assert first == [spelt(inputs, "Plan it first."), spelt(inputs, "yes")]
    assert [type(segment) for segment in second] == [Text, Picture, Text]
    assert [second[0], second[2]] == [spelt(inputs, "Plan it first."), spelt(inputs, "no")]
    words = spelt(inputs, "two rings").ids[1:]
    assert inputs.responses(["two rings", ""], end_of_turn=True) == [words, words[-1:]]
    assert inputs.responses(["two rings", ""], end_of_turn=False) == [words[:-1], []]


def test_text_of_ids(inputs):
    ids = torch.tensor(spelt(inputs, " a red circle").ids)
    assert inputs.texts(ids[None, 1:]) == [" a red circle"]


def test_control_tokens_are_refused_and_can_be_taken_out(inputs):
    assert set(inputs.control) == set(SPECIALS)
    for token in SPECIALS:
        with pytest.raises(BackboneError, match="contains the control token"):
            inputs.ids(f"a {token} circle")
    assert inputs.without_control("a <|im_<|im_end|>start|>b") == "a b"


# Public sizes: sides between 224 and 980 pixels, in patches of 14, of which 70 are the most.
@pytest.mark.parametrize(
    "size, expected",
    [
        ((980, 980), (980, 980)),
        ((1024, 1024), (980, 980)),
        ((512, 512), (518, 518)),  # 36.57 patches
        ((100, 200), (224, 448)),
        ((2000, 500), (980, 238)),  # 245 is 17.5 patches, and 17 would be the even number below
        ((10, 1000), (14, 980)),  # too thin for the shortest side
        ((224, 230), (224, 224)),
    ],
)
def test_public_sizes(size, expected):
    found = made(InputSettings(), 14, 70).fitting_size(*size)
    assert all(side % 14 == 0 and side <= 980 for side in found)
    assert found == expected if size != (2000, 500) else found in ((980, 238), (980, 252))


def test_the_table_of_positions_bounds_the_longest_side():
    assert made(InputSettings(shortest=16, longest=500), 8, 6).fitting_size(100, 100) == (48, 48)


def test_a_picture_that_fits_is_not_resampled(inputs):
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    pixels = inputs.picture(image).pixels
    assert pixels.shape == (3, 16, 24)
    assert torch.equal(((pixels + 1) * 127.5).round().byte(), torch.from_numpy(image).permute(2, 0, 1))
    assert (pixels.min(), pixels.max()) == (-1, 1)


def test_other_pictures_are_resampled_smoothly(inputs):
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    pixels = inputs.picture(image).pixels
    assert pixels.shape == (3, 24, 32)  # 21.3 x 32 pixels, in patches of 8
    expected = np.asarray(Image.fromarray(image).resize((32, 24), Image.Resampling.BICUBIC))
    assert torch.equal(((pixels + 1) * 127.5).round().byte(), torch.from_numpy(expected.copy()).permute(2, 0, 1))


# ---- the file of settings -----------------------------------------------------------------------------------------


def test_without_a_file_the_settings_are_public(tmp_path):
    assert InputSettings.from_folder(tmp_path) == InputSettings(224, 980, (1024, 1024), THINK)


def test_settings_come_from_their_file(tmp_path):
    file = tmp_path / "unified_rl.json"
    file.write_text(json.dumps({"vit": {"shortest": 16, "longest": 32}, "drawn": [32, 48], "think": "Plan it first."}))
    assert InputSettings.from_folder(tmp_path) == SMALL
    file.write_text(json.dumps({"vit": {"longest": 500}}))
    assert InputSettings.from_folder(tmp_path) == InputSettings(longest=500)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"size": 3}, "unknown size; known are vit, drawn, think"),
        ({"vit": {"stride": 3}}, "unknown stride; known are shortest, longest"),
        ({"vit": 224}, "vit must be an object"),
        ({"vit": {"shortest": 0}}, "shortest must be a whole number above 0"),
        ({"vit": {"shortest": 600, "longest": 500}}, "shortest 600 is above longest 500"),
        ({"drawn": 32}, r"drawn must be \[height, width\]"),
        ({"drawn": [32, 1.5]}, r"drawn\[1\] must be a whole number"),
        ({"think": 1}, "think must be a text"),
    ],
)
def test_unusable_settings_are_refused(tmp_path, values, said):
    (tmp_path / "unified_rl.json").write_text(json.dumps(values))
    with pytest.raises(BackboneError, match=f"unified_rl.json: {said}"):
        InputSettings.from_folder(tmp_path)


@pytest.mark.parametrize("drawn", [[40, 32], [96, 32]])
def test_drawn_sizes_must_fit_the_model(random_bagel_folder, tmp_path, drawn):
    for file in random_bagel_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "unified_rl.json").unlink()
    (tmp_path / "unified_rl.json").write_text(json.dumps({"drawn": drawn}))
    with pytest.raises(BackboneError, match="multiples of 16 up to 80"):
        BagelBackbone.from_pretrained(tmp_path)


# ---- the public tokenizer's files ---------------------------------------------------------------------------------


def write_qwen2_layout(folder, tokenizer):
    """vocab.json, merges.txt and tokenizer_config.json as the public checkpoint has them: control tokens last."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    words = {w: i - len(SPECIALS) for w, i in state["model"]["vocab"].items() if w not in SPECIALS}
    (folder / "vocab.json").write_text(json.dumps(words))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    added = {
        str(len(words) + number): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": True,
        }
        for number, token in enumerate(SPECIALS)
    }  # fmt: skip
    config = {
        "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "additional_special_tokens": list(SPECIALS[1:]), "bos_token": None,
        "unk_token": None, "errors": "replace", "add_prefix_space": False, "split_special_tokens": False,
        "model_max_length": 131072,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_tokenizer_in_the_public_layout_gives_the_same_tokens(random_bagel_folder, tmp_path):
    usual = BagelBackbone.from_pretrained(random_bagel_folder)
    for file in random_bagel_folder.iterdir():
        if not file.name.startswith(("tokenizer", "special_tokens")):
            (tmp_path / file.name).symlink_to(file)
    write_qwen2_layout(tmp_path, usual.tokenizer)
    public = BagelBackbone.from_pretrained(tmp_path)
    assert "Qwen2" in type(public.tokenizer).__name__
    last = len(public.tokenizer) - len(SPECIALS)
    assert public.inputs.special == SpecialTokens(*(last + number for number in (1, 2, 3, 4)))
    assert public.inputs.control == usual.inputs.control
    for text in ("a red circle", "What is it? yes", "two rings left of a blue square"):
        tokens = [b.tokenizer.convert_ids_to_tokens(b.inputs.ids(text)) for b in (public, usual)]
        assert tokens[0] == tokens[1]


def test_a_folder_without_a_tokenizer_is_refused(random_bagel_folder, tmp_path):
    for file in random_bagel_folder.iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(BackboneError, match="has no tokenizer"):
        BagelBackbone.from_pretrained(tmp_path)
