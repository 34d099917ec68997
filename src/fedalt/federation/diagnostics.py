"""Two numbers a round: how far factor means are from the mean of products, and how far the rows moved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedalt.names import ROW, A, B, Tensors


def row_gap(uploads: Sequence[Tensors]) -> float | None:
    """‖mean(BA) − B̄Ā‖_F / ‖mean(BA)‖_F over all layers of all uploads; nothing when the mean product is zero.

    Uses mean(BA) − B̄Ā = 1/n Σ (B_m − B̄)(A_m − Ā) and ⟨BA, B'A'⟩ = tr((BᵀB')(A'Aᵀ)), so only r×r products are
    formed and nothing cancels.
    """
    keys = [key for key in uploads[0] if key.factor == A]
    gap = total = 0.0
    for key in keys:
        a = torch.stack([tensors[key] for tensors in uploads]).double()  # [n, r, d_in]
        b = torch.stack([tensors[key._replace(factor=B)] for tensors in uploads]).double()  # [n, d_out, r]
        gap += _norm2(a - a.mean(0), b - b.mean(0))
        total += _norm2(a, b)
    return (max(gap, 0.0) / total) ** 0.5 if total > 0 else None


def row_drift(before: Tensors, after: Tensors) -> float | None:
    """‖R' − R‖ / ‖R‖ over the factors of a client's row; nothing while it has no row yet."""
    keys = [key for key in after if key.slot == ROW]
    old = sum(float(before[key].double().square().sum()) for key in keys)
    moved = sum(float((after[key].double() - before[key].double()).square().sum()) for key in keys)
    return (moved / old) ** 0.5 if old > 0 else None


def _norm2(a: Float[Tensor, "n r d"], b: Float[Tensor, "n o r"]) -> float:
    """‖1/n Σ b_m a_m‖_F²."""
    flat_a, flat_b = a.flatten(0, 1), b.transpose(0, 1).flatten(1)  # [n·r, d], [o, n·r]
    return float(((flat_b.T @ flat_b) * (flat_a @ flat_a.T)).sum()) / len(a) ** 2
