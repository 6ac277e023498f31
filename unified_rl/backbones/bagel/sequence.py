"""Batches of mixed sequences: text, pictures that are read, and latents that are drawn, each a segment of a row.

A pass of the model takes B rows, each a list of segments, behind a context of keys and values from earlier passes.
Text is causal; the tokens of a picture or latent see each other in both directions; every segment sees all earlier
ones of its row, except noisy latents, which nothing else sees. All tokens of an image share one rotary position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch

from unified_rl.backbones.bagel.config import BagelConfig
from unified_rl.backbones.bagel.positions import grid_positions
from unified_rl.backbones.base import BackboneError

PADDING = -1  # segment number of a padded slot


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that BAGEL puts around its segments."""

    text_start: int
    text_end: int
    image_start: int
    image_end: int

    @classmethod
    def of(cls, vocabulary: Mapping[str, int]) -> SpecialTokens:
        """The ids in a tokenizer's vocabulary.

        Raises:
            BackboneError: it lacks one of them.
        """
        names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
        absent = [name for name in names if name not in vocabulary]
        if absent:
            raise BackboneError(f"the tokenizer has no {', '.join(absent)}: it is not BAGEL's")
        return cls(*(vocabulary[name] for name in names))

    def wrap(self, ids: Sequence[int]) -> list[int]:
        """A complete text: start, ids, end."""
        return [self.text_start, *ids, self.text_end]


@dataclass(frozen=True)
class Text:
    """Token ids exactly as they go in; see `SpecialTokens.wrap`."""

    ids: Sequence[int]


@dataclass(frozen=True)
class Picture:
    """An image to read: pixels fp [3, H, W] in [-1, 1], both sides multiples of the vision tower's patch."""

    pixels: torch.Tensor


@dataclass(frozen=True)
class Latent:
    """An image in the VAE's latent space.

    Attributes:
        tokens: fp32 [rows * columns, latent width], row by row; see `patchify`.
        rows, columns: of the token grid.
        time: of the flow, 0 for a clean image, 1 for noise.
        noisy: an image being drawn, seen by nobody else; otherwise one to look at.
    """

    tokens: torch.Tensor
    rows: int
    columns: int
    time: float = 0.0
    noisy: bool = False


Segment = Text | Picture | Latent


@dataclass(frozen=True)
class Packed:
    """B rows padded to L slots, with what the model computes sorted by who computes it.

    The understanding experts take the text tokens, the pictures' patches and all tokens around images (Tu in all, row
    by row), the generation experts the latent tokens (Tg in all, row by row); padding costs them nothing.

    Attributes:
        ids: int64 [Tt] text and boundary tokens.
        patches: fp [I, P, patch width] of all pictures, padded; patch_positions int64 [I, P];
            patch_valid bool [I, P].
        latents: fp32 [Tg, latent width]; latent_positions int64 [Tg]; times fp32 [Tg].
        understanding_order: int64 [Tu], where each understanding token stands in text tokens followed by patches.
        understanding_slots, generation_slots: int64 [Tu], [Tg], places in the flattened [B * L].
        positions: int64 [B, L] rotary positions.
        segments: int64 [B, L] number of the segment in its row, PADDING where there is none.
        causal, noisy: bool [B, L], properties of the slot's segment.
        next_position: int64 [B], on the CPU, where a later segment would start.
    """

    ids: torch.Tensor
    patches: torch.Tensor
    patch_positions: torch.Tensor
    patch_valid: torch.Tensor
    latents: torch.Tensor
    latent_positions: torch.Tensor
    times: torch.Tensor
    understanding_order: torch.Tensor
    understanding_slots: torch.Tensor
    generation_slots: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    causal: torch.Tensor
    noisy: torch.Tensor
    next_position: torch.Tensor

    def to(self, device: torch.device) -> Packed:
        """On `device`, but for `next_position` and what decides visibility: those are looked at by the host."""
        host = ("segments", "causal", "noisy", "next_position")
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name not in host}
        return replace(self, **moved)

    def at(self, latents: torch.Tensor, times: torch.Tensor) -> Packed:
        """The same layout around other latents.

        Args:
            latents: fp32 [Tg, latent width], or any shape that flattens to it.
            times: fp32 scalar, or [Tg].
        """
        latents = latents.reshape(self.latents.shape)
        times = torch.as_tensor(times, dtype=torch.float32, device=latents.device).expand(len(latents))
        return replace(self, latents=latents, times=times)

    def tiled(self, start: torch.Tensor) -> Packed:
        """This layout of one row without pictures, which starts at 0, for every row of a context; on its own device.

        Args:
            start: int64 [B], `Context.next_position`.
        """
        rows, device = len(start), self.positions.device

        def each(part: torch.Tensor) -> torch.Tensor:
            return part.repeat(rows, *[1] * (part.ndim - 1))

        def shifted(part: torch.Tensor, by: int) -> torch.Tensor:
            return (part + by * torch.arange(rows, device=device)[:, None]).flatten()

        size = self.positions.shape[1]
        return Packed(
            each(self.ids),
            *(self.patches, self.patch_positions, self.patch_valid),
            *(each(part) for part in (self.latents, self.latent_positions, self.times)),
            understanding_order=shifted(self.understanding_order, len(self.ids)),
            understanding_slots=shifted(self.understanding_slots, size),
            generation_slots=shifted(self.generation_slots, size),
            positions=self.positions + start[:, None].to(device),
            segments=each(self.segments),
            causal=each(self.causal),
            noisy=each(self.noisy),
            next_position=self.next_position + start,
        )

    def following(self, ids: torch.Tensor) -> Packed:
        """One token of text a row, behind this pass of one token of text a row.

        Args:
            ids: int64 [B].
        """
        return replace(self, ids=ids, positions=self.positions + 1, next_position=self.next_position + 1)

    def in_rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B, L, ...] with the understanding tokens [Tu, ...] in their slots and zeros elsewhere."""
        size = self.positions.shape
        rows = tokens.new_zeros(size.numel(), *tokens.shape[1:]).index_copy(0, self.understanding_slots, tokens)
        return rows.unflatten(0, size)


def pack(
    rows: Sequence[Sequence[Segment]], config: BagelConfig, special: SpecialTokens, start: torch.Tensor | None = None
) -> Packed:
    """Lay out one pass.

    Args:
        rows: segments of each row in order; a row may be empty, and all rows may differ.
        start: int64 [B] rotary position of each row's first token, `Context.next_position`; default 0. Always pass
            it behind a context: nothing else tells the two apart.

    Raises:
        BackboneError: an image of a size that does not fit, naming its row.
    """
    packer = _Packer(config, special)
    for number, segments in enumerate(rows):
        packer.add_row(number, segments, 0 if start is None else int(start[number]))
    return packer.finish()


def patchify(image: torch.Tensor, patch: int) -> torch.Tensor:
    """[..., (H / patch) (W / patch), patch * patch * C] of an image or latent [..., C, H, W].

    Tokens go row by row; inside a token the order is row, column, channel.
    """
    cells = image.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # ..., C, rows, patch, columns, patch
    return cells.movedim((-4, -2), (-5, -4)).movedim(-3, -1).flatten(-3).flatten(-3, -2)


def unpatchify(tokens: torch.Tensor, rows: int, columns: int, patch: int) -> torch.Tensor:
    """Inverse of `patchify`: [..., C, rows * patch, columns * patch] of [..., rows * columns, patch * patch * C]."""
    cells = tokens.unflatten(-1, (patch, patch, -1)).unflatten(-4, (rows, columns))
    return cells.movedim(-1, -5).movedim(-3, -2).flatten(-2).flatten(-3, -2)


class _Packer:
    """Collects rows for `pack`."""

    def __init__(self, config: BagelConfig, special: SpecialTokens) -> None:
        self.config, self.special = config, special
        self.ids: list[int] = []
        self.pictures: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.latents: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        # Per row and token: kind (t text, p patch, l latent), rotary position, segment, causal, noisy.
        self.rows: list[list[tuple[str, int, int, bool, bool]]] = []
        self.next_position: list[int] = []

    def add_row(self, number: int, segments: Sequence[Segment], position: int) -> None:
        tokens: list[tuple[str, int, int, bool, bool]] = []
        for index, segment in enumerate(segments):
            if isinstance(segment, Text):
                self.ids += segment.ids
                tokens += [("t", position + i, index, True, False) for i in range(len(segment.ids))]
                position += len(segment.ids)
                continue
            if isinstance(segment, Picture):
                kind, count, noisy = "p", self._picture(number, segment), False
            else:
                kind, count, noisy = "l", self._latent(number, segment), segment.noisy
            self.ids += [self.special.image_start, self.special.image_end]
            tokens += [(k, position, index, False, noisy) for k in ("t", *[kind] * count, "t")]
            # What follows a noisy image does not see it, and starts where it does.
            position += not noisy
        self.rows.append(tokens)
        self.next_position.append(position)

    def _picture(self, number: int, picture: Picture) -> int:
        patch, side = self.config.vision.patch, self.config.vision.side
        _, height, width = picture.pixels.shape
        rows, columns = height // patch, width // patch
        if height % patch or width % patch or not (0 < rows <= side and 0 < columns <= side):
            raise BackboneError(
                f"row {number}: a picture of {height} x {width} pixels; sides must be multiples of {patch} up to"
                f" {side * patch}, so resize it"
            )
        self.pictures.append((patchify(picture.pixels, patch), grid_positions(rows, columns, side)))
        return rows * columns

    def _latent(self, number: int, latent: Latent) -> int:
        side, width = self.config.latent_side, self.config.latent_width
        if not (0 < latent.rows <= side and 0 < latent.columns <= side):
            raise BackboneError(
                f"row {number}: {latent.rows} x {latent.columns} latent tokens; at most {side} a side fit"
            )
        count = latent.rows * latent.columns
        if latent.tokens.shape != (count, width):
            raise BackboneError(
                f"row {number}: latent tokens of shape {list(latent.tokens.shape)}, expected {[count, width]}"
            )
        where = grid_positions(latent.rows, latent.columns, side)
        self.latents.append((latent.tokens, where, torch.full((count,), float(latent.time))))
        return count

    def finish(self) -> Packed:
        length = max(map(len, self.rows), default=0)
        if not length:
            raise BackboneError("nothing to compute: every row is empty")
        padded = [row + [("", 0, PADDING, False, False)] * (length - len(row)) for row in self.rows]
        kinds = [token[0] for row in padded for token in row]
        text, patches, latents = ([i for i, kind in enumerate(kinds) if kind == k] for k in "tpl")
        understanding = torch.tensor(text + patches)
        by_slot = understanding.argsort()
        columns = [torch.tensor([[token[i] for token in row] for row in padded]) for i in range(1, 5)]
        return Packed(
            torch.tensor(self.ids, dtype=torch.long),
            *self._padded_pictures(),
            *self._joined_latents(),
            understanding_order=by_slot,
            understanding_slots=understanding[by_slot],
            generation_slots=torch.tensor(latents, dtype=torch.long),
            positions=columns[0],
            segments=columns[1],
            causal=columns[2],
            noisy=columns[3],
            next_position=torch.tensor(self.next_position),
        )

    def _padded_pictures(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        width = 3 * self.config.vision.patch**2
        if not self.pictures:
            none = torch.zeros(0, 0, dtype=torch.long)
            return torch.zeros(0, 0, width), none, none.bool()
        patches, positions = (
            torch.nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in zip(*self.pictures, strict=True)
        )
        lengths = torch.tensor([len(where) for _, where in self.pictures])
        return patches, positions, torch.arange(patches.shape[1]) < lengths[:, None]

    def _joined_latents(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not self.latents:
            none = torch.zeros(0, dtype=torch.long)
            return torch.zeros(0, self.config.latent_width), none, torch.zeros(0)
        tokens, positions, times = (torch.cat(part) for part in zip(*self.latents, strict=True))
        return tokens, positions, times
