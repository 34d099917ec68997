"""How the LoRAs of a layer are weighed against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Mixing:
    """Weights α_i of the slots in ``y = W0 x + s · Σ_i α_i B_i A_i x̃``.

    Attributes:
        kind: ``sum`` (α ≡ 1), ``fixed`` weights, ``softmax`` of the mixer's G x per token, or ``instance``: one pair of
            weights per row of a batch, which come with the batch; without them the slots are added up.
        weights: For ``fixed``, one per slot.
        most: For ``instance``, the largest weight that similarity gives.
        target: For ``instance``, the slot that gets it.
        embed: For ``instance``, the slots under which rows are compared.
    """

    kind: Literal["sum", "fixed", "softmax", "instance"] = "sum"
    weights: tuple[float, ...] = ()
    most: float = 1.0
    target: str = ""
    embed: tuple[str, ...] = ()

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Mixing:
        """What JSON has made of a mixing."""
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists})


SUM = Mixing()
SOFTMAX = Mixing("softmax")
