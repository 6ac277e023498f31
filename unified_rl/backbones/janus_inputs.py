"""Prompts, questions and pictures as the tensors that a Janus reads, all through the checkpoint's own processor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers import JanusProcessor

from unified_rl.backbones.base import BackboneError, check_picture, check_text, distinct_images


class JanusInputs:
    """Turns text and images into token ids, masks and pixels.

    The chat format comes from `processor.apply_chat_template` alone, so a tiny and a public checkpoint take the same
    path. The tokenizer puts BOS first; prompts are padded on the left.

    Args:
        processor: of the checkpoint, with a chat template.
        device: where the tensors go.
    """

    def __init__(self, processor: JanusProcessor, device: torch.device) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.device = device
        self.boi_id: int = self.tokenizer.convert_tokens_to_ids(processor.image_start_token)
        self.image_id: int = self.tokenizer.convert_tokens_to_ids(processor.image_token)
        self.response_lead = self._response_lead()

    def _response_lead(self) -> str:
        """What the chat template writes between the open assistant turn and the assistant's text, e.g. one space."""
        turn = {"role": "user", "content": [{"type": "text", "text": "Q"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "ANSWER"}]}
        opened = self.processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        closed = self.processor.apply_chat_template([turn, answer], add_generation_prompt=False, tokenize=False)
        if not closed.startswith(opened) or "ANSWER" not in closed:
            raise BackboneError(
                "the processor's chat template does not continue an open assistant turn with the assistant's text: "
                f"{closed!r} against {opened!r}"
            )
        return closed[len(opened) :].split("ANSWER")[0]

    def _chat(self, contents: Sequence[list[dict]]) -> list[str]:
        for content in contents:
            self.check_text(content[-1]["text"])
        conversations = [[{"role": "user", "content": content}] for content in contents]
        return self.processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)

    def check_text(self, text: str) -> None:
        """Raise when `text` contains control tokens."""
        check_text(text, self.tokenizer.all_special_tokens)

    def _processed(self, texts: list[str], **kwargs: object) -> dict[str, torch.Tensor]:
        bos = self.tokenizer.bos_token
        written = bool(bos) and texts[0].startswith(bos)  # by the chat template itself
        return self.processor(
            text=texts,
            padding=True,
            padding_side="left",
            add_special_tokens=not written,
            return_tensors="pt",
            **kwargs,
        ).to(self.device)

    def drawing(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask, int64 [B, T] each, of the turn that asks for an image; the last token opens the image."""
        texts = self._chat([[{"type": "text", "text": prompt}] for prompt in prompts])
        batch = self._processed(texts, generation_mode="image")
        return batch["input_ids"], batch["attention_mask"]

    def unconditional(self, ids: torch.Tensor) -> torch.Tensor:
        """`ids` with everything but BOS and BOI replaced by padding, as transformers' own guidance does (same mask)."""
        kept = (ids == self.tokenizer.bos_token_id) | (ids == self.boi_id)
        return ids.masked_fill(~kept, self.tokenizer.pad_token_id)

    def reading(
        self, images: Sequence[np.ndarray | None], questions: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Ids and mask int64 [B, T], pixels fp32 [N, 3, H, W] of the N images (None where there is none).

        Args:
            images: uint8 [H, W, 3] of any size, or None for a question without an image.
        """
        texts = self._reading_chat(images, questions)
        pictures = [_picture(image, row) for row, image in enumerate(images) if image is not None]
        batch = self._processed(texts, images=pictures or None)
        return batch["input_ids"], batch["attention_mask"], batch.get("pixel_values")

    def _reading_chat(self, images: Sequence[np.ndarray | None], questions: Sequence[str]) -> list[str]:
        if len(images) != len(questions):
            raise BackboneError(f"{len(images)} images but {len(questions)} questions")
        return self._chat(
            [
                ([] if image is None else [{"type": "image"}]) + [{"type": "text", "text": question}]
                for image, question in zip(images, questions, strict=True)
            ]
        )

    def shared_reading(
        self, images: Sequence[np.ndarray | None], questions: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same tokens as `reading`, cut behind the image.

        Returns:
            What ends with each of D distinct images: ids int64 [D, T] and pixels fp32 [D, 3, H, W]. For every row, its
            number among these (-1: the row has no image), int64 [B]; ids and mask int64 [B, R] of what follows,
            padded on the left.
        """
        texts = self._reading_chat(images, questions)
        first, places = distinct_images(images)
        bare = [row for row, place in enumerate(places) if place < 0]
        pictures = [_picture(images[row], row) for row in first]
        batch = self._processed([texts[row] for row in (*first, *bare)], images=pictures)
        written = [ids[mask == 1] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        starts = torch.stack([ids[: int((ids == self.image_id).nonzero()[-1]) + 1] for ids in written[: len(first)]])
        # The text behind an image starts with a special token, where tokenizers cut anyway.
        rests = [self.processor.image_end_token + text.partition(self.processor.image_token)[2] for text in texts]
        behind = self.tokenizer(rests, add_special_tokens=False)["input_ids"]
        for row, ids in zip(bare, written[len(first) :], strict=True):
            behind[row] = ids.tolist()
        width, pad = max(map(len, behind)), self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in behind], device=self.device)
        lengths = torch.tensor([len(row) for row in behind], device=self.device)
        mask = (torch.arange(width, 0, -1, device=self.device) <= lengths[:, None]).long()
        return starts, batch["pixel_values"], torch.tensor(places, device=self.device), ids, mask

    def responses(self, texts: Sequence[str], end_of_turn: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids int64 [B, L] and mask fp32 [B, L] of assistant texts, padded on the right (L is at least 1)."""
        for text in texts:
            self.check_text(text)
        written = [self.response_lead + text if text else "" for text in texts]
        rows = self.tokenizer(written, add_special_tokens=False)["input_ids"]
        if end_of_turn:
            rows = [[*row, self.tokenizer.eos_token_id] for row in rows]
        width = max([1, *(len(row) for row in rows)])
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        return ids, (torch.arange(width, device=self.device) < lengths[:, None]).float()

    def texts(self, ids: torch.Tensor) -> list[str]:
        """Text of int64 [B, T] responses, without special tokens and without the chat format's leading space."""
        decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.removeprefix(self.response_lead) for text in decoded]


def _picture(image: np.ndarray, row: int) -> Image.Image:
    check_picture(image, row)
    return Image.fromarray(image)
