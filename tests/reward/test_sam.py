"""Segment Anything as a proposer, on a tiny random model: the real class, held against transformers' own filter."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.torch
import torch

from unified_rl.reward import sam
from unified_rl.reward.regions import Region, RegionError, box_iou
from unified_rl.reward.sam import SamProposer, SamRules

# Random masks are poor: with the bounds of the published model nothing would be left to look at.
LOOSE = SamRules(points_per_side=6, min_quality=0.01, min_stability=0.4, max_iou=1.0, points_at_once=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import SamConfig, SamModel
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    path = tmp_path_factory.mktemp("sam")
    config = SamConfig(
        vision_config={
            "hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 8,
            "mlp_dim": 64,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SamModel(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.3)
        for layers in model.mask_decoder.output_hypernetworks_mlps:
            layers.proj_out.weight.data *= 40
    model.save_pretrained(path)
    SamImageProcessorPil(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16}, mask_pad_size={"height": 16, "width": 16},
    ).save_pretrained(path)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def image():
    picture = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    picture[4:20, 6:20] = (250, 10, 10)
    return picture


def by_transformers(proposer, image):
    """Boxes and areas of the kept masks, in the order of the points, by the functions of transformers' pipeline."""
    height, width = image.shape[:2]
    rules, processor = proposer.rules, proposer.processor
    boxes, points, pictures, labels = processor.generate_crop_boxes(image, 64, points_per_crop=rules.points_per_side)
    inputs = processor(images=pictures, return_tensors="pt")
    with torch.no_grad():
        made = proposer.model(
            pixel_values=inputs["pixel_values"],
            input_points=points.float(),
            input_labels=labels,
        )
    masks = processor.post_process_masks(
        made.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"], binarize=False
    )
    runs, _, kept = processor.filter_masks(
        masks[0], made.iou_scores[0], (height, width), boxes[0], rules.min_quality, rules.min_stability
    )
    areas = [sum(run["counts"][1::2]) for run in runs]
    return {((x1, y1, x2 + 1, y2 + 1), a) for (x1, y1, x2, y2), a in zip(kept.tolist(), areas, strict=True) if a}


def test_boxes_and_areas_are_those_of_transformers(folder, image):
    proposer = SamProposer(folder, rules=LOOSE)
    regions = proposer(image)
    wanted = by_transformers(proposer, image)
    assert len(wanted) > 5
    assert {(r.box, r.area) for r in regions} == wanted
    for region in regions:
        x1, y1, x2, y2 = region.box
        assert 0 <= x1 < x2 <= 48 and 0 <= y1 < y2 <= 32 and 0 < region.area <= (x2 - x1) * (y2 - y1)
        assert all(type(v) is int for v in (*region.box, region.area))


def test_near_duplicates_go_and_the_better_stays(folder, image):
    everything = SamProposer(folder, rules=LOOSE)(image)
    proposer = SamProposer(folder, rules=dataclasses.replace(LOOSE, max_iou=0.5))
    kept = proposer(image)
    assert 0 < len(kept) < len(everything) and set(kept) <= set(everything)
    assert all(box_iou(a.box, b.box) <= 0.5 for i, a in enumerate(kept) for b in kept[:i])
    assert kept[0] == everything[0]  # both begin with the mask of the highest predicted quality


def test_bounds_are_bounds(folder, image):
    counts = [
        len(SamProposer(folder, rules=dataclasses.replace(LOOSE, min_stability=bound))(image)) for bound in (0.3, 0.7)
    ]
    assert counts[0] > counts[1] > 0
    assert SamProposer(folder, rules=dataclasses.replace(LOOSE, min_quality=1e6))(image) == []


def test_the_amount_that_is_held_at_once_changes_nothing(folder, image, monkeypatch):
    whole = SamProposer(folder, rules=LOOSE)(image)
    few = SamProposer(folder, rules=dataclasses.replace(LOOSE, points_at_once=5))(image)
    monkeypatch.setattr(sam, "PIXELS_AT_ONCE", 1)
    one = SamProposer(folder, rules=LOOSE)(image)
    assert len(whole) == len(few) == len(one)
    assert {r.box for r in whole} == {r.box for r in few} == {r.box for r in one}


def test_a_mask_by_hand(folder):
    """Logits of 10 inside a rectangle and -10 outside of it, at the size of the image."""
    proposer = SamProposer(folder, rules=SamRules())
    masks = torch.full((2, 64, 64), -10.0)
    masks[0, 8:24, 16:40] = 10.0
    masks[1, :, :] = -0.5  # empty, and all of it within the offset
    found = proposer._regions(masks, torch.tensor([0.9, 0.99]), ((64, 64), (64, 64)))
    assert found == [(pytest.approx(0.9), Region((16, 8, 40, 24), 16 * 24))]


def test_the_published_bounds_are_the_default():
    assert SamRules() == SamRules(32, 0.88, 0.95, 0.7, 64)


def test_weights_stay_frozen_and_other_folders_are_refused(folder, tmp_path):
    proposer = SamProposer(folder)
    assert not proposer.model.training and not any(p.requires_grad for p in proposer.model.parameters())
    with pytest.raises(RegionError, match="is no checkpoint folder"):
        SamProposer(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(RegionError, match="is no checkpoint folder"):
        SamProposer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam2"}))
    with pytest.raises(RegionError, match="model_type is 'sam2', only 'sam' can"):
        SamProposer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam"}))
    with pytest.raises(RegionError, match="lacks preprocessor_config.json"):
        SamProposer(tmp_path)


def test_missing_weights_are_refused(folder, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights["mask_decoder.iou_token.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RegionError, match="lacks weights of SAM, such as mask_decoder.iou_token.weight"):
        SamProposer(tmp_path)
