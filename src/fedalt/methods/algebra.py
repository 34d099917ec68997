"""The algebra of LoRAs: sums of products of low rank, factors across ranks, weighted means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from fedalt.config import RunConfig
from fedalt.errors import UserError
from fedalt.names import RANK_AXIS, B, Key, Tensors

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


@dataclass
class WeightedSum:
    """A running Σ w·X in fp64: additive, mergeable, and as large as one upload whatever the number of clients."""

    total: dict[Key, Tensor] = field(default_factory=dict)
    weight: float = 0.0

    def add(self, tensors: Tensors, weight: float) -> None:
        """Add one upload."""
        for key, value in tensors.items():
            term = value.double() * weight
            self.total[key] = self.total[key] + term if key in self.total else term
        self.weight += weight

    def mean(self) -> dict[Key, Tensor]:
        """Σ w·X / Σ w in fp32.

        Raises:
            ZeroDivisionError: Nothing was added, or only weights of zero.
        """
        if self.weight <= 0:
            raise ZeroDivisionError("the mean of uploads with total weight 0 is undefined")
        return {key: (value / self.weight).float() for key, value in self.total.items()}


def mean_of(uploads: Mapping[int, Tensors], weights: Mapping[int, float]) -> dict[Key, Tensor]:
    """The mean of some clients' uploads, in the order of ``weights``; each is read once and not kept."""
    running = WeightedSum()
    for client, weight in weights.items():
        running.add(uploads[client], weight)
    return running.mean()


def refuse_weighting(config: RunConfig, who: str, instead: str) -> None:
    """For uploads that are not weighed by rows, nor evenly."""
    weighting = config.federation.weighting
    if weighting != "method":
        raise UserError(f"federation.weighting: {weighting} has no effect on {who}, {instead}; leave it out")
