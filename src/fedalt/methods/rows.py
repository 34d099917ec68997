"""Rows of FedALT made from single uploads: exact means of products, and means that a faulty client cannot bend.

Each builder reads all uploads once and returns the row of any client. For client k, with weights q_m over the others:

    stack         A = [A_m],  B = [q_m B_m]                  B A = Σ q_m B_m A_m exactly
    svd           the best approximation of that of a given rank (Eckart-Young), never forming B A
    fair          A = Σ q_m A_m,  B = Σ q_m B_m + ΔB,  ΔB = (Σ q_m B_m A_m − B A) Aᵀ (A Aᵀ + λ I)⁻¹
    median        coordinate by coordinate
    trimmed_mean  the same, without the largest and smallest share
    krum          the one upload whose nearest neighbours are nearest (Blanchard et al., NeurIPS 2017)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedalt.methods.exchange import Gathered
from fedalt.methods.options import FedALTConfig
from fedalt.methods.products import Factors, fit_b, stacked, truncated
from fedalt.names import INDIVIDUAL, ROW, A, B, Key

Rows = Callable[[int], dict[Key, Tensor]]
Builder = Callable[[Gathered, int, FedALTConfig], Rows]


def _row(factors: Mapping[str, Factors]) -> dict[Key, Tensor]:
    row = {}
    for module, (a, b) in factors.items():
        row[Key(module, ROW, A)], row[Key(module, ROW, B)] = a.float(), b.float()
    return row


def stack(gathered: Gathered, rank: int, options: FedALTConfig) -> Rows:
    """The exact mean of products, of as many times the rank as there are others."""
    layers = gathered.factors(INDIVIDUAL)

    def row(client: int) -> dict[Key, Tensor]:
        shares = gathered.shares(client)
        return _row({module: stacked([(*mine[c], q) for c, q in shares.items()]) for module, mine in layers.items()})

    return row


def svd(gathered: Gathered, rank: int, options: FedALTConfig) -> Rows:
    """The exact mean's best approximation of the row's rank."""
    layers = gathered.factors(INDIVIDUAL)
    bases = {module: truncated(mine) for module, mine in layers.items()}

    def row(client: int) -> dict[Key, Tensor]:
        shares = gathered.shares(client)
        return _row({module: best(shares, rank) for module, best in bases.items()})

    return row


def fair(gathered: Gathered, rank: int, options: FedALTConfig) -> Rows:
    """The factor mean with B fitted to the mean of products, as LoRA-FAIR does by least squares."""
    layers = gathered.factors(INDIVIDUAL)

    def row(client: int) -> dict[Key, Tensor]:
        shares = gathered.shares(client)
        fits = {m: fit_b([(*mine[c], q) for c, q in shares.items()], options.ridge) for m, mine in layers.items()}
        return _row(fits)

    return row


def _by_coordinate(rule: Callable[[Tensor], Tensor]) -> Builder:
    def build(gathered: Gathered, rank: int, options: FedALTConfig) -> Rows:
        uploads = {client: gathered.uploads[client] for client in gathered.weights}

        def row(client: int) -> dict[Key, Tensor]:
            others = [tensors for c, tensors in uploads.items() if c != client]
            return {
                key._replace(slot=ROW): rule(torch.stack([tensors[key] for tensors in others])) for key in others[0]
            }

        return row

    return build


def _median(values: Tensor) -> Tensor:
    """The middle value, or the mean of the two in the middle."""
    ordered, n = values.sort(0).values, len(values)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def trimmed_mean(gathered: Gathered, rank: int, options: FedALTConfig) -> Rows:
    """The mean without ⌊trim·n⌋ values at each end."""

    def rule(values: Tensor) -> Tensor:
        cut = int(options.trim * len(values))
        return values.sort(0).values[cut : len(values) - cut].mean(0)

    return _by_coordinate(rule)(gathered, rank, options)


def krum(gathered: Gathered, rank: int, options: FedALTConfig) -> Rows:
    """The upload with the least sum of squared distances to its n − f − 2 (at least one) nearest among the n others."""
    clients = list(gathered.weights)
    keys = list(gathered.uploads[clients[0]])
    flat = torch.stack([torch.cat([gathered.uploads[c][key].flatten() for key in keys]).double() for c in clients])
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()

    def row(client: int) -> dict[Key, Tensor]:
        others = [i for i, c in enumerate(clients) if c != client]
        near = max(1, len(others) - options.byzantine - 2)
        scores = [distances[i, [j for j in others if j != i]].sort().values[:near].sum() for i in others]
        chosen = clients[others[int(torch.stack(scores).argmin())]]
        return {key._replace(slot=ROW): value for key, value in gathered.uploads[chosen].items()}

    return row


AGGREGATORS: dict[str, Builder] = {
    "stack": stack,
    "svd": svd,
    "fair": fair,
    "median": _by_coordinate(_median),
    "trimmed_mean": trimmed_mean,
    "krum": krum,
}
ROBUST = ("median", "trimmed_mean", "krum")
"""Those to which every upload counts the same."""
