"""Weighted means of uploads, one upload at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedalt.config import RunConfig
from fedalt.errors import UserError
from fedalt.names import Key, Tensors


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
    """For uploads that are not weighed by rows, nor evenly.

    Raises:
        UserError: ``federation.weighting`` is set.
    """
    weighting = config.federation.weighting
    if weighting != "method":
        raise UserError(f"federation.weighting: {weighting} has no effect on {who}, {instead}; leave it out")
