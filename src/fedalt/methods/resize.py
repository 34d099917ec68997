"""Factors across ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from fedalt.names import RANK_AXIS, B, Key, Tensors


def cut(tensors: Tensors, rank: int) -> dict[Key, Tensor]:
    """Factors down to a rank: the first rows of A, the first columns of B."""
    return {key: value.narrow(RANK_AXIS[key.factor], 0, rank).contiguous() for key, value in tensors.items()}


def widened(tensors: Tensors, rank: int) -> dict[Key, Tensor]:
    """Factors padded with zeros up to a rank: what ``cut`` took away, as nothing."""

    def pad(key: Key, value: Tensor) -> Tensor:
        short = rank - value.shape[RANK_AXIS[key.factor]]
        return torch.nn.functional.pad(value, (0, short) if key.factor == B else (0, 0, 0, short))

    return {key: pad(key, value) for key, value in tensors.items()}


def padded(tensors: Tensors, like: Tensors) -> dict[Key, Tensor]:
    """Factors padded with zeros to the ranks of others.

    Raises:
        ValueError: A factor is larger than what it is padded to.
    """
    result = dict(tensors)
    for key, value in tensors.items():
        rows, columns = (want - have for want, have in zip(like[key].shape, value.shape, strict=True))
        if rows < 0 or columns < 0:
            raise ValueError(f"{key} is {tuple(value.shape)}, larger than {tuple(like[key].shape)}")
        if rows or columns:
            result[key] = torch.nn.functional.pad(value, (0, columns, 0, rows))
    return result
