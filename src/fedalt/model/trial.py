"""Trying on a model itself whether another way of reading rows gives what the plain one gives."""

from __future__ import annotations

import torch
from torch import Tensor


def agree(tried: Tensor, plain: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways differ by no more than a model of this dtype rounds."""
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2
    return bool((tried - plain).abs().max() <= tolerance * plain.abs().max())
