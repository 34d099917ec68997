"""Rows of unequal length in groups of like length: what attention needs of packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

_LIKE = 0.8
"""Rows of at least this share of a group's longest row join the group."""


@dataclass(frozen=True)
class Group:
    """Rows that are attended to together.

    Attributes:
        rows: Number of rows.
        width: Slots of every row.
        padded: Whether some row is shorter than that.
        mask: True where a slot holds a token.
    """

    rows: int
    width: int
    padded: bool
    mask: Bool[Tensor, "rows 1 1 width"]


@dataclass(frozen=True)
class Layout:
    """Slots of the tokens of packed rows while they are in groups of one length.

    Attributes:
        groups: The groups, longest rows first.
        token: Token that stands in each slot; slots of padding repeat their row's last token.
        slot: Slot of each token.
        starts: First token of every row, in the rows' own order, and the number of tokens; 32-bit, as kernels want it.
    """

    groups: tuple[Group, ...]
    token: Int[Tensor, " s"]
    slot: Int[Tensor, " t"]
    starts: Int[Tensor, " rows+1"]


def layout(lengths: Sequence[int], device: torch.device) -> Layout:
    """Group rows by length, longest first."""
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups: list[Group] = []
    tokens: list[Tensor] = []
    slot = torch.empty(starts[-1], dtype=torch.long)
    used = 0
    while order:
        width = lengths[order[0]]
        mine = [row for row in order if lengths[row] >= _LIKE * width]
        order = order[len(mine) :]
        sizes = torch.tensor([lengths[row] for row in mine])
        columns = torch.arange(width).expand(len(mine), -1)
        real = columns < sizes[:, None]
        token = torch.tensor([starts[row] for row in mine])[:, None] + columns.minimum(sizes[:, None] - 1)
        slot[token[real]] = used + real.flatten().nonzero()[:, 0]
        groups.append(Group(len(mine), width, not bool(real.all()), real[:, None, None].to(device)))
        tokens.append(token.flatten())
        used += token.numel()
    ends = torch.tensor(starts, dtype=torch.int32, device=device)
    return Layout(tuple(groups), torch.cat(tokens).to(device), slot.to(device), ends)
