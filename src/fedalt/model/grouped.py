"""Products of every token with the matrix of its own client.

Shapes: k clients, n tokens grouped by client (``counts``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from jaxtyping import Float, Int
from torch import Tensor

Counts = Sequence[int]


def per_client(x: Float[Tensor, "n i"], w: Float[Tensor, "k i o"], counts: Counts) -> Float[Tensor, "n o"]:
    """Multiply every token by the matrix of its own client: ``y[n] = x[n] · w[client of n]``."""
    if len(set(counts)) == 1:
        return torch.bmm(x.view(len(counts), -1, x.shape[1]), w).view(len(x), -1)
    if _joins(x):
        return joint(x, w, counts)
    y = x.new_empty(len(x), w.shape[2])
    for x_k, w_k, y_k in zip(x.split(list(counts)), w, y.split(list(counts)), strict=True):
        torch.mm(x_k, w_k, out=y_k)
    return y


def add_per_client(
    y: Float[Tensor, "n o"], x: Float[Tensor, "n i"], w: Float[Tensor, "k i o"], counts: Counts
) -> Float[Tensor, "n o"]:
    """``y + per_client(x, w)`` in one pass."""
    if len(set(counts)) == 1:
        k = len(counts)
        return torch.baddbmm(y.view(k, -1, y.shape[1]), x.view(k, -1, x.shape[1]), w).view_as(y)
    if _joins(x):
        return y + joint(x, w, counts)
    out = torch.empty_like(y)
    parts = [tensor.split(list(counts)) for tensor in (y, x, out)]
    for y_k, x_k, out_k, w_k in zip(*parts, w, strict=True):
        torch.addmm(y_k, x_k, w_k, out=out_k)
    return out


def outer_per_client(x: Float[Tensor, "n i"], y: Float[Tensor, "n o"], counts: Counts) -> Float[Tensor, "k i o"]:
    """Every client's Σ over its tokens of ``x[n] ⊗ y[n]``: the gradient of ``per_client`` to its matrices."""
    if len(set(counts)) == 1:
        k = len(counts)
        return torch.bmm(x.view(k, -1, x.shape[1]).transpose(1, 2), y.view(k, -1, y.shape[1]))
    if _joins(x):
        return joint_outer(x, y, counts)
    out = x.new_empty(len(counts), x.shape[1], y.shape[1])
    for x_k, y_k, out_k in zip(x.split(list(counts)), y.split(list(counts)), out, strict=True):
        torch.mm(x_k.t(), y_k, out=out_k)
    return out


def joint(x: Float[Tensor, "n i"], w: Float[Tensor, "k i o"], counts: Counts) -> Float[Tensor, "n o"]:
    """``per_client`` in one call."""
    y = F.grouped_mm(_padded(x), _padded(_padded(w, 1)), offs=_ends(tuple(counts), x.device))
    return y[:, : w.shape[2]]


def joint_outer(x: Float[Tensor, "n i"], y: Float[Tensor, "n o"], counts: Counts) -> Float[Tensor, "k i o"]:
    """``outer_per_client`` in one call; clients without tokens get zeros, which torch leaves to the card."""
    out = F.grouped_mm(_padded(x).t(), _padded(y), offs=_ends(tuple(counts), x.device))
    for mine, count in zip(out, counts, strict=True):
        if not count:
            mine.zero_()
    return out[:, : x.shape[1], : y.shape[1]]


def _joins(x: Tensor) -> bool:
    """Whether torch has a kernel for groups of unequal size: bf16 on Hopper and on Blackwell for data centres.

    On other cards it is a loop that asks the card for the sizes first, each time.
    """
    return x.is_cuda and x.dtype == torch.bfloat16 and _generation(x.device) in (9, 10)


@lru_cache(maxsize=64)
def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _padded(x: Tensor, dim: int = -1) -> Tensor:
    """Zeros up to a multiple of eight numbers: the kernel wants rows that start at 16 bytes."""
    lacking = -x.shape[dim] % 8
    return F.pad(x, (0, lacking) if dim == -1 else (0, 0, 0, lacking)) if lacking else x


@lru_cache(maxsize=64)
def _ends(counts: tuple[int, ...], device: torch.device) -> Int[Tensor, " k"]:
    """Where each client's tokens end; the same for all layers of a step."""
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)
