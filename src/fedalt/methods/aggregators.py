"""Rows of FedALT made from single uploads: exact means of products, and means that a faulty client cannot bend.

Each builder reads all uploads once and returns the row of any client. For client k, with weights q_m over the others:

    factor_mean   A = Σ q_m A_m,  B = Σ q_m B_m               the paper's; the server sends the sum to all instead
    stack         A = [A_m],  B = [q_m B_m]                  B A = Σ q_m B_m A_m exactly
    svd           the best approximation of that of a given rank (Eckart-Young), never forming B A
    fair          A = Σ q_m A_m,  B = Σ q_m B_m + ΔB,  ΔB = (Σ q_m B_m A_m − B A) Aᵀ (A Aᵀ + λ I)⁻¹
    median        coordinate by coordinate
    trimmed_mean  the same, without the largest and smallest share
    krum          the one upload whose nearest neighbours are nearest (Blanchard et al., NeurIPS 2017)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from pydantic import Field
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from fedalt.config.section import Section
from fedalt.methods.algebra import Factors, fit_b, inner, mean_of, stacked, truncated
from fedalt.methods.base import Gathered
from fedalt.names import INDIVIDUAL, REST_OF_WORLD, A, B, Key
from fedalt.registry import AGGREGATORS, registered_name


def cluster_rows(gathered: Gathered, slots: Sequence[str]) -> Callable[[int], dict[Key, Tensor]]:
    """A builder of a client's rows, one per slot.

    Clients are grouped by average linkage on 1 − cos⟨B A, B' A'⟩ over all layers. A client's first row is the mean of
    its own group without itself, the others follow by their group's similarity to its own, so that each mixer keeps
    seeing the same kind of row in the same place. A group without anybody else leaves its row at zero. With one
    group this is FedALT.
    """
    clients = list(gathered.weights)
    similarity = similarities(gathered)
    labels = groups(similarity, len(slots))

    def rows(client: int) -> dict[Key, Tensor]:
        own = labels[clients.index(client)] if client in clients else labels[0]
        near = {label: similarity[np.ix_(labels == own, labels == label)].mean() for label in set(labels.tolist())}
        order = sorted(near, key=lambda label: (label != own, -near[label], label))
        tensors: dict[Key, Tensor] = {}
        for slot, label in zip(slots, [*order, *[None] * len(slots)], strict=False):
            mine = [c for c, its in zip(clients, labels, strict=True) if its == label and c != client]
            weights = {c: gathered.weights[c] for c in mine}
            mean = mean_of(gathered.uploads, weights) if mine else None
            for key, value in (mean or gathered.uploads[clients[0]]).items():
                tensors[key._replace(slot=slot)] = value if mean else torch.zeros_like(value)
        return tensors

    return rows


def similarities(gathered: Gathered) -> np.ndarray:
    """Cosines between all clients' products B A, over all layers."""
    uploads = [gathered.uploads[client] for client in gathered.weights]
    keys = [key for key in uploads[0] if key.factor == A]
    parts = [[(tensors[key], tensors[key._replace(factor=B)]) for key in keys] for tensors in uploads]
    gram = np.array([[sum(map(inner, one, other)) for other in parts] for one in parts])
    size = np.sqrt(np.maximum(np.diag(gram), np.finfo(float).tiny))
    cosines: np.ndarray = gram / np.outer(size, size)
    return cosines


def groups(similarity: np.ndarray, count: int) -> np.ndarray:
    """A label from 1 for every client; at most ``count`` groups."""
    if len(similarity) == 1:
        return np.ones(1, dtype=int)
    distance = np.maximum(1 - (similarity + similarity.T) / 2, 0)
    np.fill_diagonal(distance, 0)
    labels: np.ndarray = fcluster(linkage(squareform(distance, checks=False), "average"), count, "maxclust")
    return labels


Rows = Callable[[int], dict[Key, Tensor]]
Builder = Callable[[Gathered, int, "RestOfWorldSettings"], Rows]
FACTOR_MEAN = "factor_mean"


class RestOfWorldSettings(Section):
    """How the RoW LoRA is made of the others' uploads."""

    rest_of_world_aggregator: registered_name(AGGREGATORS) = Field(  # type: ignore[valid-type]
        FACTOR_MEAN,
        description="how the RoW LoRA is made of the others' uploads: means of A and of B (paper), the exact mean of "
        "products, its best approximation of rank rest_of_world_rank, factor_mean with B fitted to it, a robust rule, "
        "or FILE.py:name",
    )
    rest_of_world_rank: int | None = Field(None, ge=1, description="rank of an svd RoW LoRA; lora.r when not given")
    ridge: float = Field(0.01, ge=0, description="fair: weight of the size of the correction")
    trim: float = Field(0.2, ge=0, lt=0.5, description="trimmed_mean: share of values dropped at each end")
    byzantine: int = Field(1, ge=0, description="krum: clients that may be faulty")


def _robust(name: str) -> Callable[[Builder], Builder]:
    """Register a rule to which every upload counts the same."""

    def decorate(build: Builder) -> Builder:
        build.robust = True  # type: ignore[attr-defined]
        return cast(Builder, AGGREGATORS.register(name)(build))

    return decorate


def _row(factors: Mapping[str, Factors]) -> dict[Key, Tensor]:
    row = {}
    for module, (a, b) in factors.items():
        row[Key(module, REST_OF_WORLD, A)], row[Key(module, REST_OF_WORLD, B)] = a.float(), b.float()
    return row


@AGGREGATORS.register(FACTOR_MEAN)
def factor_mean(gathered: Gathered, rank: int, settings: RestOfWorldSettings) -> Rows:
    """The means of A and of B; what runs do in another way, with one sum for all clients."""

    def row(client: int) -> dict[Key, Tensor]:
        mean = mean_of(gathered.uploads, gathered.shares(client))
        return {key._replace(slot=REST_OF_WORLD): value for key, value in mean.items()}

    return row


@AGGREGATORS.register("stack")
def stack(gathered: Gathered, rank: int, settings: RestOfWorldSettings) -> Rows:
    """The exact mean of products, of as many times the rank as there are others."""
    layers = gathered.factors(INDIVIDUAL)

    def row(client: int) -> dict[Key, Tensor]:
        shares = gathered.shares(client)
        return _row({module: stacked([(*mine[c], q) for c, q in shares.items()]) for module, mine in layers.items()})

    return row


@AGGREGATORS.register("svd")
def svd(gathered: Gathered, rank: int, settings: RestOfWorldSettings) -> Rows:
    """The exact mean's best approximation of the row's rank."""
    layers = gathered.factors(INDIVIDUAL)
    bases = {module: truncated(mine) for module, mine in layers.items()}

    def row(client: int) -> dict[Key, Tensor]:
        shares = gathered.shares(client)
        return _row({module: best(shares, rank) for module, best in bases.items()})

    return row


@AGGREGATORS.register("fair")
def fair(gathered: Gathered, rank: int, settings: RestOfWorldSettings) -> Rows:
    """The factor mean with B fitted to the mean of products, as LoRA-FAIR does by least squares."""
    layers = gathered.factors(INDIVIDUAL)

    def row(client: int) -> dict[Key, Tensor]:
        shares = gathered.shares(client)
        fits = {m: fit_b([(*mine[c], q) for c, q in shares.items()], settings.ridge) for m, mine in layers.items()}
        return _row(fits)

    return row


def _by_coordinate(rule: Callable[[Tensor], Tensor]) -> Builder:
    def build(gathered: Gathered, rank: int, settings: RestOfWorldSettings) -> Rows:
        uploads = {client: gathered.uploads[client] for client in gathered.weights}

        def row(client: int) -> dict[Key, Tensor]:
            others = [tensors for c, tensors in uploads.items() if c != client]
            return {
                key._replace(slot=REST_OF_WORLD): rule(torch.stack([tensors[key] for tensors in others]))
                for key in others[0]
            }

        return row

    return build


@_robust("median")
def median(gathered: Gathered, rank: int, settings: RestOfWorldSettings) -> Rows:
    """The middle value, or the mean of the two in the middle."""

    def rule(values: Tensor) -> Tensor:
        ordered, n = values.sort(0).values, len(values)
        return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2

    return _by_coordinate(rule)(gathered, rank, settings)


@_robust("trimmed_mean")
def trimmed_mean(gathered: Gathered, rank: int, settings: RestOfWorldSettings) -> Rows:
    """The mean without ⌊trim·n⌋ values at each end."""

    def rule(values: Tensor) -> Tensor:
        cut = int(settings.trim * len(values))
        return values.sort(0).values[cut : len(values) - cut].mean(0)

    return _by_coordinate(rule)(gathered, rank, settings)


@_robust("krum")
def krum(gathered: Gathered, rank: int, settings: RestOfWorldSettings) -> Rows:
    """The upload with the least sum of squared distances to its n − f − 2 (at least one) nearest among the n others."""
    clients = list(gathered.weights)
    keys = list(gathered.uploads[clients[0]])
    flat = torch.stack([torch.cat([gathered.uploads[c][key].flatten() for key in keys]).double() for c in clients])
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()

    def row(client: int) -> dict[Key, Tensor]:
        others = [i for i, c in enumerate(clients) if c != client]
        near = max(1, len(others) - settings.byzantine - 2)
        scores = [distances[i, [j for j in others if j != i]].sort().values[:near].sum() for i in others]
        chosen = clients[others[int(torch.stack(scores).argmin())]]
        return {key._replace(slot=REST_OF_WORLD): value for key, value in gathered.uploads[chosen].items()}

    return row
