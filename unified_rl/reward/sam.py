"""Region proposals by Segment Anything, the paper's proposer (SRUM 3), with transformers' model and local files only.

The rules and numbers are those of SAM's automatic mask generator on the whole image: masks for a grid of points, those
kept that the model itself finds good and that do not hang on the threshold, near-duplicates removed best first. They
are written out here because the last step of transformers' own pipeline needs torchvision, and because only boxes and
areas are wanted: a thousand points give three thousand masks of a megapixel, which are never held together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from unified_rl.reward.regions import Region, RegionError, box_iou

STABILITY_OFFSET = 1.0  # a stable mask hardly changes when its threshold is moved by this
PIXELS_AT_ONCE = 1 << 26  # of enlarged masks, fp32: a quarter of a gibibyte


@dataclass(frozen=True)
class SamRules:
    """Which masks are proposals; the defaults are the automatic mask generator's.

    Attributes:
        points_per_side: each point of this grid over the image is asked for three masks.
        min_quality: lower bound of the intersection over union that the model predicts for its own mask.
        min_stability: lower bound of a mask's overlap with itself at thresholds one apart.
        max_iou: of two masks whose boxes overlap by more, the one with less predicted quality goes.
        points_at_once: points in one forward of the mask decoder.
    """

    points_per_side: int = 32
    min_quality: float = 0.88
    min_stability: float = 0.95
    max_iou: float = 0.7
    points_at_once: int = 64


class SamProposer:
    """Segment Anything in memory; call it with an image.

    Args:
        path: folder of a checkpoint that transformers calls `sam` (such as sam-vit-huge): config.json,
            preprocessor_config.json and the weights.
        device: where it runs, in fp32.

    Raises:
        RegionError: no such checkpoint in the folder.
    """

    def __init__(self, path: Path | str, device: torch.device | str = "cpu", rules: SamRules | None = None) -> None:
        # Imported here: only runs that use SAM should wait for it.
        from transformers import SamModel
        from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

        folder = Path(path)
        _check_layout(folder)
        self.rules = rules or SamRules()
        self.processor = SamImageProcessorPil.from_pretrained(folder, local_files_only=True)
        model, report = SamModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:  # transformers only warns, and proposes regions with random weights
            raise RegionError(f"{folder} lacks weights of SAM, such as {min(report['missing_keys'])}")
        self.model = model.to(device).eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> list[Region]:
        """Proposals for a uint8 [H, W, 3] image, the best first by predicted quality; unfiltered by size and number."""
        inputs = self.processor(images=image, return_tensors="pt")
        sizes = tuple(tuple(inputs[name][0].tolist()) for name in ("original_sizes", "reshaped_input_sizes"))
        embedding = self.model.get_image_embeddings(inputs["pixel_values"].to(self.model.device))
        found: list[tuple[float, Region]] = []
        for points in self._points(sizes[1]).split(self.rules.points_at_once):
            masks, quality = self._masks(embedding, points)
            good = quality > self.rules.min_quality
            step = max(1, PIXELS_AT_ONCE // max(sizes[0][0] * sizes[0][1], self.processor.pad_size["height"] ** 2))
            for part, scores in zip(masks[good].split(step), quality[good].split(step), strict=True):
                found += self._regions(part, scores, sizes)
        kept: list[Region] = []
        for _, region in sorted(found, key=lambda item: -item[0]):
            if all(box_iou(region.box, k.box) <= self.rules.max_iou for k in kept):
                kept.append(region)
        return kept

    def _points(self, reshaped: tuple[int, int]) -> torch.Tensor:
        """fp32 [P, 2] x and y of the grid's points, in pixels of the resized image that the model sees."""
        side = self.rules.points_per_side
        along = (torch.arange(side) + 0.5) / side
        y, x = torch.meshgrid(along * reshaped[0], along * reshaped[1], indexing="ij")
        return torch.stack([x.flatten(), y.flatten()], dim=-1).to(self.model.device)

    def _masks(self, embedding: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Low-resolution mask logits [3 P, h, w] of P points, and the quality [3 P] that the model predicts."""
        labels = torch.ones(1, len(points), 1, dtype=torch.long, device=points.device)
        made = self.model(image_embeddings=embedding, input_points=points[None, :, None], input_labels=labels)
        return made.pred_masks[0].flatten(0, 1), made.iou_scores[0].flatten()

    def _regions(
        self, masks: torch.Tensor, quality: torch.Tensor, sizes: tuple[tuple[int, int], tuple[int, int]]
    ) -> list[tuple[float, Region]]:
        """Predicted quality and region of the stable ones among mask logits [M, h, w]."""
        if not len(masks):
            return []
        (large,) = self.processor.post_process_masks([masks[None]], [sizes[0]], [sizes[1]], binarize=False)
        logits = large[0]
        inner = (logits > STABILITY_OFFSET).sum((1, 2))
        outer = (logits > -STABILITY_OFFSET).sum((1, 2))
        inside = logits > 0
        areas = inside.sum((1, 2))
        kept = (inner > self.rules.min_stability * outer) & (areas > 0)
        regions = []
        for i in kept.nonzero().flatten().tolist():
            rows, columns = inside[i].any(1).nonzero().flatten(), inside[i].any(0).nonzero().flatten()
            box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
            regions.append((float(quality[i]), Region(box, int(areas[i]))))
        return regions


def _check_layout(folder: Path) -> None:
    try:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RegionError(f"{folder} is no checkpoint folder: it has no config.json with a model_type") from None
    if kind != "sam":
        raise RegionError(f"{folder}/config.json: model_type is {kind!r}, only 'sam' can propose regions")
    if not (folder / "preprocessor_config.json").is_file():
        raise RegionError(f"{folder} lacks preprocessor_config.json, which says how pictures are resized for SAM")
