"""The names of slots and factors, once: every tensor of a client is keyed by (module, slot, factor)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

INDIVIDUAL = "individual"
"""Slot that only its client trains and nothing global overwrites (paper: Individual LoRA)."""
ROW = "row"
"""Frozen slot: the mean of the other clients' individual LoRAs (paper: rest-of-world LoRA)."""
GLOBAL = "global"
"""Slot that the server's mean overwrites at the start of every round (FedAvg)."""
MIXER = "mixer"
"""Pseudo-slot of the per-token softmax mixer, whose only factor is G."""

A, B, G = "A", "B", "G"


class Key(NamedTuple):
    """Address of one tensor: module path in the base model, slot, and factor A ``[r, d_in]``, B or G."""

    module: str
    slot: str
    factor: str

    def __str__(self) -> str:
        return ".".join(self)

    @classmethod
    def parse(cls, text: str) -> Key:
        """Invert ``str(key)``; module paths may hold dots, slots and factors may not."""
        module, slot, factor = text.rsplit(".", 2)
        return cls(module, slot, factor)


Tensors = Mapping[Key, Tensor]
"""One client's tensors, or a mean of several clients' tensors."""
