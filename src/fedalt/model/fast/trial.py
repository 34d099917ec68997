"""Trying on a model itself whether another way of reading rows gives what the plain one gives."""

from __future__ import annotations

import torch
from torch import Tensor


def agree(tried: Tensor, plain: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways differ by no more than a deep model of this dtype rounds."""
    return _apart(tried, plain) <= (0.1 if _half(dtype) else 1e-4)


def untouched(after: Tensor, before: Tensor, own: int, dtype: torch.dtype) -> bool:
    """Whether a change was seen where it was made, and nowhere else.

    Args:
        after: States, the way that is tried.
        before: The same before the change, at the same places.
        own: The one that the change belongs to.
        dtype: Of the model.
    """
    others = [at for at in range(len(after)) if at != own]
    most = (2e-3 if _half(dtype) else 1e-4) * _apart(after[own], before[own])
    return _apart(after[others], before[others]) <= most


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


def _half(dtype: torch.dtype) -> bool:
    return dtype not in (torch.float32, torch.float64)
