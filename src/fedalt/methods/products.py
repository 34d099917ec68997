"""Sums of products Σ q_m B_m A_m of low rank, without ever forming a dense matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Factors = tuple[Float[Tensor, "r d"], Float[Tensor, "o r"]]
"""A and B of one layer."""
Weighted = tuple[Float[Tensor, "r d"], Float[Tensor, "o r"], float]
"""A, B and the weight of their product."""


def stacked(parts: Sequence[Weighted]) -> Factors:
    """A = [A_m], B = [q_m B_m]: B A is the weighted sum of products exactly."""
    return torch.cat([a for a, _, _ in parts]), torch.cat([q * b for _, b, q in parts], 1)


def truncated(parts: Mapping[int, Factors]) -> Callable[[Mapping[int, float], int], Factors]:
    """Best approximations of weighted sums of the same products: ``(weights, rank) → A, B``.

    One QR of all factors serves all weights: [B_m] = Q_B R_B and [A_m]ᵀ = Q_A R_A, so that Σ q_m B_m A_m is
    Q_B (R_B diag(q) R_Aᵀ) Q_Aᵀ, and only the small matrix in the middle, U Σ Vᵀ, is decomposed each time. The
    singular values are shared out evenly: B = Q_B U √Σ, A = √Σ Vᵀ Q_Aᵀ. Of each pair of singular vectors, the sign is
    the one that makes the largest entry of U's positive, so that equal uploads give equal bytes.
    """
    clients = list(parts)
    sizes = torch.tensor([len(parts[c][0]) for c in clients])
    left, right = torch.linalg.qr(torch.cat([parts[c][1] for c in clients], 1).double())
    down, up = torch.linalg.qr(torch.cat([parts[c][0] for c in clients]).T.double())

    def best(weights: Mapping[int, float], rank: int) -> Factors:
        u, sigma, v = _svd(right, up, weights)
        roots = sigma[:rank].sqrt()
        return roots[:, None] * (v[:rank] @ down.T), (left @ u[:, :rank]) * roots

    def _svd(right: Tensor, up: Tensor, weights: Mapping[int, float]) -> tuple[Tensor, Tensor, Tensor]:
        q = torch.tensor([weights.get(c, 0.0) for c in clients], dtype=torch.float64).repeat_interleave(sizes)
        u, sigma, v = torch.linalg.svd((right * q) @ up.T, full_matrices=False)
        signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
        signs[signs == 0] = 1
        return u * signs, sigma, v * signs.T

    return best


def factor_means(parts: Sequence[Weighted]) -> Factors:
    """A = Σ q_m A_m, B = Σ q_m B_m in fp64."""
    return sum(q * a.double() for a, _, q in parts), sum(q * b.double() for _, b, q in parts)  # type: ignore[return-value]


def onto(parts: Sequence[Weighted], a: Float[Tensor, "s d"]) -> Float[Tensor, "o s"]:
    """(Σ q_m B_m A_m) aᵀ in fp64, with the sum never formed."""
    target: Tensor = sum(q * (b_m.double() @ (a_m.double() @ a.T)) for a_m, b_m, q in parts)  # type: ignore[assignment]
    return target


def fit_b(parts: Sequence[Weighted], ridge: float) -> Factors:
    """Factor means with B moved towards the mean of products P = Σ q_m B_m A_m.

        argmin over ΔB of ‖P − (B̄ + ΔB) Ā‖² + λ ‖ΔB‖²,   ΔB = (P − B̄ Ā) Āᵀ (Ā Āᵀ + λ I)⁻¹

    With λ = 0 a pseudo-inverse takes the place of the inverse. P is never formed: P Āᵀ = Σ q_m B_m (A_m Āᵀ).
    """
    a, b = factor_means(parts)
    gram = a @ a.T
    inverse = torch.linalg.pinv(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), hermitian=True)
    return a, b + (onto(parts, a) - b @ gram) @ inverse


def norm(a: Float[Tensor, "r d"], b: Float[Tensor, "o r"]) -> float:
    """‖B A‖_F, from r × r products."""
    a, b = a.double(), b.double()
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


def inner(one: Factors, other: Factors) -> float:
    """⟨B A, B' A'⟩_F = tr((Bᵀ B')(A' Aᵀ)), from r × r products."""
    (a, b), (c, d) = one, other
    return float(((b.double().T @ d.double()) * (a.double() @ c.double().T)).sum())
