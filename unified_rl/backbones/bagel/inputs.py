"""Prompts, questions and pictures as segments, in the formats that the public model was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from unified_rl.backbones.bagel.config import JsonFile
from unified_rl.backbones.bagel.sequence import Picture, Segment, SpecialTokens, Text
from unified_rl.backbones.base import BackboneError, check_picture, check_text

SETTINGS = "unified_rl.json"
THINK = "Plan the picture before you draw it, and write the plan between <think> and </think>."


@dataclass(frozen=True)
class InputSettings:
    """What a checkpoint expects of its inputs; the defaults are those of BAGEL-7B-MoT.

    Attributes:
        shortest, longest: sides in pixels that pictures to read are brought between.
        drawn: height and width in pixels of the images that it draws.
        think: instruction in front of a prompt that is planned before it is drawn.
    """

    shortest: int = 224
    longest: int = 980
    drawn: tuple[int, int] = (1024, 1024)
    think: str = THINK

    @classmethod
    def from_folder(cls, folder: Path) -> InputSettings:
        """From `unified_rl.json`, {"vit": {"shortest", "longest"}, "drawn": [height, width], "think"}.

        Everything in it may be missing, and so may the file.

        Raises:
            BackboneError: an unknown key or an impossible value.
        """
        file = folder / SETTINGS
        if not file.is_file():
            return cls()
        whole = JsonFile.read(file)
        whole.allow("vit", "drawn", "think")
        if not isinstance(whole.values.get("vit", {}), dict):
            raise BackboneError(f"{file}: vit must be an object, not {whole.values['vit']!r}")
        vit = whole.nested("vit")
        vit.allow("shortest", "longest")
        shortest, longest = vit.integer("shortest", cls.shortest), vit.integer("longest", cls.longest)
        if shortest > longest:
            raise BackboneError(f"{file}: shortest {shortest} is above longest {longest}")
        drawn = whole.values.get("drawn", cls.drawn)
        if not isinstance(drawn, list | tuple) or len(drawn) != 2:
            raise BackboneError(f"{file}: drawn must be [height, width], not {drawn!r}")
        sides = JsonFile(file, {"drawn[0]": drawn[0], "drawn[1]": drawn[1]})
        think = whole.values.get("think", THINK)
        if not isinstance(think, str):
            raise BackboneError(f"{file}: think must be a text, not {think!r}")
        return cls(shortest, longest, (sides.integer("drawn[0]"), sides.integer("drawn[1]")), think)


class BagelInputs:
    """Turns text and images into segments.

    Args:
        tokenizer: of the checkpoint.
        settings: of the checkpoint.
        patch, side: of the vision tower: pixels of a patch's side, and patches of the largest image's side.
        device: where the model is.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: InputSettings,
        patch: int,
        side: int,
        device: torch.device,
    ) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.patch, self.longest_side = patch, side * patch
        self.device = device
        self.special = SpecialTokens.of(tokenizer.get_vocab())
        self.control = control_tokens(tokenizer, self.special)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text without control tokens."""
        check_text(text, self.control)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def whole(self, text: str) -> Text:
        """A text with its boundaries."""
        return Text(self.special.wrap(self.ids(text)))

    def drawing(self, prompt: str, plan: str | None = None) -> list[Segment]:
        """What stands in front of an image to draw."""
        if plan is None:
            return [self.whole(prompt)]
        return [self.whole(self.settings.think), self.whole(prompt), self.whole(plan)]

    def reading(
        self, images: Sequence[np.ndarray | None], questions: Sequence[str], system: str = ""
    ) -> list[list[Segment]]:
        """What stands in front of each answer.

        Args:
            images: uint8 [H, W, 3] of any size, or None for a question without an image.
        """
        if len(images) != len(questions):
            raise BackboneError(f"{len(images)} images but {len(questions)} questions")
        return [
            [*self.start(image, system, row), self.whole(question)]
            for row, (image, question) in enumerate(zip(images, questions, strict=True))
        ]

    def start(self, image: np.ndarray | None, system: str = "", row: int = 0) -> list[Segment]:
        """What stands in front of a question."""
        first = [self.whole(system)] if system else []
        return first if image is None else [*first, self.picture(image, row)]

    def picture(self, image: np.ndarray, row: int = 0) -> Picture:
        """A uint8 [H, W, 3] image at a size that the vision tower takes; `row` is for messages."""
        check_picture(image, row)
        height, width = self.fitting_size(*image.shape[:2])
        if (height, width) != image.shape[:2]:
            image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
        return Picture(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1)

    def fitting_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width nearest to an image's between the shortest and longest side, in whole patches."""
        longest = min(self.settings.longest, self.longest_side)
        scale = min(longest / max(height, width), 1.0)
        scale = max(scale, self.settings.shortest / min(height, width))
        scale = min(scale, longest / max(height, width))  # of a thin strip the longest side decides
        return tuple(self._whole_patches(round(side * scale), longest) for side in (height, width))

    def _whole_patches(self, pixels: int, longest: int) -> int:
        patches = min(round(pixels / self.patch), longest // self.patch)
        return max(patches, 1) * self.patch

    def responses(self, texts: Sequence[str], end_of_turn: bool) -> list[list[int]]:
        """Ids of answers as far as they are scored, without the token that opens them."""
        end = [self.special.text_end] if end_of_turn else []
        return [[*self.ids(text), *end] for text in texts]

    def texts(self, ids: torch.Tensor) -> list[str]:
        """Text of int64 [B, T] answers, without control tokens."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)

    def without_control(self, text: str) -> str:
        """A written text as it can be read again: control tokens that were spelt out are taken from it."""
        while any(token in text for token in self.control):
            for token in self.control:
                text = text.replace(token, "")
        return text


def control_tokens(tokenizer: PreTrainedTokenizerBase, special: SpecialTokens) -> list[str]:
    """Texts that the tokenizer turns into control tokens."""
    marked = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    around = (special.text_start, special.text_end, special.image_start, special.image_end)
    return sorted(marked | set(tokenizer.all_special_tokens) | set(tokenizer.convert_ids_to_tokens(around)))
