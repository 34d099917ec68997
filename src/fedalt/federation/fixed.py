"""Fixed point, for sums whose terms nobody sees.

    q = round(clip(x, ±8) · 2²²),   x̂ = q / 2²²,   |x − x̂| ≤ 2⁻²³ within ±8

x̂ is exact in fp32, and Σ w·x̂ is exact in fp64 as Σ w·q is in integers: both give the same mean to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedalt.names import Key, Tensors

LIMIT, STEPS = 8, 2**22
"""Largest number, and steps in one."""


def on_grid(tensors: Tensors) -> tuple[dict[Key, Tensor], int]:
    """x̂ of every number in fp32, and how many were cut to ±8."""
    cut = sum(int((value.abs() > LIMIT).sum()) for value in tensors.values())
    return {key: (_codes(value) / STEPS).float() for key, value in tensors.items()}, cut


def codes(tensors: Tensors) -> Tensor:
    """The codes q of all numbers in int64, one after another by the names of the tensors."""
    return torch.cat([_codes(tensors[key]).flatten() for key in sorted(tensors, key=str)]).to(torch.int64)


def mean_by_codes(total: Tensor, weight: int, shapes: Mapping[Key, tuple[int, ...]]) -> dict[Key, Tensor]:
    """Σ w·x̂ / Σ w in fp32, from Σ w·q in int64."""
    keys = sorted(shapes, key=str)
    parts = total.split([torch.Size(shapes[key]).numel() for key in keys])
    return {
        key: (part.double() / STEPS / weight).float().reshape(shapes[key])
        for key, part in zip(keys, parts, strict=True)
    }


def _codes(value: Tensor) -> Tensor:
    return (value.detach().cpu().double().clamp(-LIMIT, LIMIT) * STEPS).round()
