"""Keys and values of what a model has read so far, for any number of continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from unified_rl.backbones.bagel.sequence import PADDING, Packed

LayerCache = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Context:
    """What B rows have in front of them.

    Nothing is detached: gradients of a continuation reach what wrote the context, unless that ran without gradients.

    Attributes:
        layers: keys and values [R, capacity, kv heads, head size] of each layer, keys rotated; none for an empty one.
        valid: bool [B, length], on the CPU; the columns from `length` to the capacity are spare room.
        next_position: int64 [B], on the CPU: rotary position of the next segment.
        rows: int64 [B], on the CPU, the stored row that each of the B stands for; None when R = B in order.
    """

    layers: Sequence[LayerCache]
    valid: torch.Tensor
    next_position: torch.Tensor
    rows: torch.Tensor | None = None

    @classmethod
    def empty(cls, batch: int) -> Context:
        """Nothing read yet; also the unconditional context of guidance."""
        return cls((), torch.zeros(batch, 0, dtype=torch.bool), torch.zeros(batch, dtype=torch.long))

    @property
    def batch(self) -> int:
        """B."""
        return len(self.valid)

    @property
    def length(self) -> int:
        """Columns in use, padding included."""
        return self.valid.shape[1]

    def take(self, rows: torch.Tensor | Sequence[int]) -> Context:
        """Context of the chosen rows, in that order, a row as often as it is named.

        Nothing is copied: G samples of a prompt share its keys and values, which are expanded a layer at a time while
        that layer is computed.
        """
        rows = torch.as_tensor(rows)
        stored = rows if self.rows is None else self.rows[rows]
        return replace(self, valid=self.valid[rows], next_position=self.next_position[rows], rows=stored)

    def hide(self, rows: Sequence[bool]) -> Context:
        """The same, empty for the chosen rows (one bool for each): nobody sees what they read."""
        hidden = torch.tensor(list(rows))
        return replace(
            self, valid=self.valid & ~hidden[:, None], next_position=self.next_position.masked_fill(hidden, 0)
        )

    def reserve(self, columns: int) -> Context:
        """A copy with room for `columns` more, so that passes without gradients write in place.

        Growing copies everything at every pass; with room only the new columns are written. Of several
        continuations of one reserved context only the last is intact. An empty context has nothing to reserve.
        """

        def roomy(tensor: torch.Tensor) -> torch.Tensor:
            old = self._rows_of(tensor)[:, : self.length]
            new = old.new_zeros(len(old), self.length + columns, *old.shape[2:])
            new[:, : self.length] = old
            return new

        with torch.no_grad():
            return replace(self, layers=[(roomy(k), roomy(v)) for k, v in self.layers], rows=None)

    def extended(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> LayerCache:
        """Keys and values [B, >= length + L, ...] of a layer with those of a pass, [B, L, ...], behind the old ones."""
        if not self.layers:
            return keys, values
        old_keys, old_values = self.layers[layer]
        end = self.length + keys.shape[1]
        if self.rows is None and end <= old_keys.shape[1] and not torch.is_grad_enabled():
            old_keys[:, self.length : end], old_values[:, self.length : end] = keys, values
            return old_keys, old_values
        joined = (
            torch.cat([self._rows_of(old)[:, : self.length], new], 1)
            for old, new in ((old_keys, keys), (old_values, values))
        )
        return tuple(joined)

    def after(self, layers: Sequence[LayerCache], packed: Packed) -> Context:
        """The context behind a pass over `packed` that extended the layers; noisy latents stay out of sight."""
        visible = (packed.segments != PADDING) & ~packed.noisy
        return Context(layers, torch.cat([self.valid, visible], 1), packed.next_position)

    def _rows_of(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.rows is None else tensor.index_select(0, self.rows.to(tensor.device))
