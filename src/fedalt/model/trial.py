"""Trying on a model itself whether another way of reading rows gives what the plain one gives."""

from __future__ import annotations

import torch
from torch import Tensor


def agree(tried: Tensor, plain: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways differ by no more than a deep model of this dtype rounds."""
    return _apart(tried, plain) <= (0.1 if _half(dtype) else 1e-4)


def untouched(after: Tensor, before: Tensor, dtype: torch.dtype) -> bool:
    """Whether the same way, with the same shapes, gives the same: what changed in between was not seen."""
    return _apart(after, before) <= (1e-2 if _half(dtype) else 1e-5)


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def _half(dtype: torch.dtype) -> bool:
    return dtype not in (torch.float32, torch.float64)
