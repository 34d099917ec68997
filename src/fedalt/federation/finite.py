"""Whether numbers are finite."""

from __future__ import annotations

from torch import Tensor


def finite(value: Tensor) -> bool:
    """Whether every number is; a sum that is finite says so in one pass, and one that is not may only be too large."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())
