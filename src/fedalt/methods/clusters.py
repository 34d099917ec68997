"""Clustered rows: one row per group of clients whose individual LoRAs are alike (the paper's future work)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from fedalt.methods.exchange import Gathered
from fedalt.methods.mean import mean_of
from fedalt.methods.products import inner
from fedalt.names import A, B, Key


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
