"""Two numbers a round: how far factor means are from the mean of products, and how far the rows moved."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedalt.methods.algebra import WeightedSum
from fedalt.names import REST_OF_WORLD, A, B, G, Key, Tensors

MEMORY = 2**28
"""Bytes of products that ``product_gap`` may hold at a time; it reads the uploads again for layers beyond that."""


class ProductSum:
    """A running Σ b·a in fp64, kept as factors as long as these are smaller than the product."""

    def __init__(self) -> None:
        self._a: list[Tensor] = []
        self._b: list[Tensor] = []
        self._dense: Tensor | None = None

    def add(self, b: Float[Tensor, "o r"], a: Float[Tensor, "r d"]) -> None:
        """Add one product."""
        self._a.append(a)
        self._b.append(b)
        (r, d), o = a.shape, len(b)
        if len(self._a) * r * (o + d) > o * d:
            self._dense = self._product()
            self._a, self._b = [], []

    def norm2(self) -> float:
        """‖Σ b·a‖_F². From factors by ⟨ba, b'a'⟩ = tr((bᵀb')(a'aᵀ)), which takes only products r × r."""
        if self._dense is not None:
            return float((self._product() if self._a else self._dense).square().sum())
        a, b = torch.cat(self._a), torch.cat(self._b, 1)  # [n·r, d], [o, n·r]
        return float(((b.T @ b) * (a @ a.T)).sum())

    def _product(self) -> Tensor:
        new = torch.cat(self._b, 1) @ torch.cat(self._a)  # [o, d]
        return new if self._dense is None else self._dense + new


def product_gap(uploads: Collection[Tensors]) -> float | None:
    """‖mean(BA) − B̄Ā‖_F / ‖mean(BA)‖_F over all layers of all uploads; None when the mean product is zero.

    Uses mean(BA) − B̄Ā = 1/n Σ (B_m − B̄)(A_m − Ā), so that nothing cancels. Goes through the uploads several times
    and holds one at a time. Nothing, either, where a factor is not sent, or where ranks differ.
    """
    running = WeightedSum()
    for tensors in uploads:
        if any(key in running.total and running.total[key].shape != value.shape for key, value in tensors.items()):
            return None
        running.add(tensors, 1.0)
    if {key.factor for key in running.total} - {G} != {A, B}:
        return None
    mean = {key: value / running.weight for key, value in running.total.items()}
    gap = total = 0.0
    for keys in _groups([key for key in mean if key.factor == A], mean):
        sums = {key: (ProductSum(), ProductSum()) for key in keys}
        for tensors in uploads:
            for key, (deviations, products) in sums.items():
                other = key._replace(factor=B)
                a, b = tensors[key].double(), tensors[other].double()
                deviations.add(b - mean[other], a - mean[key])
                products.add(b, a)
        gap += sum(deviations.norm2() for deviations, _ in sums.values())
        total += sum(products.norm2() for _, products in sums.values())
    return (max(gap, 0.0) / total) ** 0.5 if total > 0 else None


def row_lora_drift(before: Tensors, after: Tensors) -> float | None:
    """‖R' − R‖ / ‖R‖ over the factors of a client's row; None while it has no row yet."""
    keys = [key for key in after if key.slot == REST_OF_WORLD]
    old = sum(float(before[key].double().square().sum()) for key in keys)
    moved = sum(float((after[key].double() - before[key].double()).square().sum()) for key in keys)
    return (moved / old) ** 0.5 if old > 0 else None


def _groups(keys: Sequence[Key], mean: Tensors) -> Iterator[list[Key]]:
    """The layers in groups whose products, and factors of about that size, fit in memory."""
    group: list[Key] = []
    size = 0
    for key in keys:
        mine = 4 * 8 * mean[key].shape[1] * len(mean[key._replace(factor=B)])
        if group and size + mine > MEMORY:
            yield group
            group, size = [], 0
        group.append(key)
        size += mine
    if group:
        yield group
