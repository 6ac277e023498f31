"""Where and when: sin-cos tables of 2-D positions, and the embedding of the flow's time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

FREQUENCIES = 256  # numbers that describe a time before the time embedder's layers
LONGEST_PERIOD = 10_000.0


def grid_positions(rows: int, columns: int, side: int) -> torch.Tensor:
    """int64 [rows * columns]: row in the table of a `side` x `side` grid of every cell, row by row."""
    return (torch.arange(rows)[:, None] * side + torch.arange(columns)).flatten()


def sincos_table(side: int, width: int) -> torch.Tensor:
    """fp32 [side * side, width] embeddings of a grid's cells, row by row.

    The first half of the width describes the column, the second half the row; each is the sines of width / 4
    frequencies, then their cosines.
    """
    quarter = width // 4
    frequencies = LONGEST_PERIOD ** -(torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    angles = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], 1)  # [side, width / 2]
    columns, rows = line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], 2).reshape(side * side, width).float()


class PositionTable(nn.Module):
    """Frozen sin-cos embeddings of a `side` x `side` grid, as a tensor of the checkpoint."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side, self.width = side, width
        self.pos_embed = nn.Parameter(torch.empty(side * side, width), requires_grad=False)
        if not self.pos_embed.is_meta:
            self.pos_embed.data.copy_(self.values())

    def values(self) -> torch.Tensor:
        """fp32 [side * side, width], for checkpoints that leave the table out."""
        return sincos_table(self.side, self.width)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """[..., width] of int64 [...] positions."""
        return F.embedding(positions, self.pos_embed)


class TimeEmbedder(nn.Module):
    """Times of the flow, between 0 (image) and 1 (noise), as vectors of the language model's width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        """[N, width] of fp32 [N] times."""
        half = FREQUENCIES // 2
        # exp of a product, not a power: the two differ in the last bits, and the checkpoint was trained with this one.
        steps = torch.arange(half, dtype=torch.float32, device=times.device)
        angles = times.float()[:, None] * torch.exp(-math.log(LONGEST_PERIOD) * steps / half)
        waves = torch.cat([angles.cos(), angles.sin()], 1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))
