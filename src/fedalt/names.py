"""The names of slots and factors, once: every tensor of a client is keyed by (module, slot, factor)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from fedalt.compat import slot_today

INDIVIDUAL = "individual"
"""Slot that only its client trains and nothing global overwrites (paper: Individual LoRA)."""
REST_OF_WORLD = "rest_of_world"
"""Frozen slot: the mean of the other clients' individual LoRAs (paper: rest-of-world LoRA)."""
GLOBAL = "global"
"""Slot that the server's mean overwrites at the start of every round (FedAvg)."""
LOCAL = "local"
"""Slot that only its client trains, beside a global one (FedDPA)."""
PRIVATE = "private"
"""Small slot that only its client trains, added to a global one (PF2LoRA)."""
PERSONAL = "personal"
"""Slot of a client's own model beside a shared one: renewed from it (FDLoRA), or held near it (Ditto)."""
FUSED = "fused"
"""Slot made of others for answering (FDLoRA)."""
MIXER = "mixer"
"""Pseudo-slot of the per-token softmax mixer, whose only factor is G."""
MERGED = "merged"
"""Pseudo-slot of what has been merged into the base, whose only factor is W ``[d_out, d_in]`` (FLoRA)."""
EVIDENCE = "evidence"
"""Pseudo-slot, of no module, of a client's losses on held-out rows; its only factor is E ``[3, n]``: with
the individual LoRA alone, as the client answers, and with the shared LoRA alone."""
ANCHOR = "anchor"
"""Pseudo-slot, of no module, of what a client's prompts are compared with; its only factor is E ``[1, d]`` (FedDPA)."""
HEAD = "head"
"""Pseudo-slot of a classification head; its factors are the names of the head's parameters."""

A, B, G, W, E, C, R = "A", "B", "G", "W", "E", "C", "R"
"""C ``[m, 1]`` is a shift of a mixer's logits, beside its G ``[m, d_in]``; R ``[r, r]`` the core of a LoRA B R A."""
RANK_AXIS = {A: 0, B: 1}
"""Axis of a factor along which its rank lies."""


class Key(NamedTuple):
    """Address of one tensor: module path in the base model, slot, and factor A ``[r, d_in]``, B, G, W, E, C or R."""

    module: str
    slot: str
    factor: str

    def __str__(self) -> str:
        return ".".join(self)

    @classmethod
    def parse(cls, text: str) -> Key:
        """Invert ``str(key)``; module paths may hold dots, slots and factors may not."""
        module, slot, factor = text.rsplit(".", 2)
        return cls(module, slot_today(slot), factor)


Tensors = Mapping[Key, Tensor]
"""One client's tensors, or a mean of several clients' tensors."""


def parted(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Adapters, and heads."""
    adapters = {key: value for key, value in tensors.items() if key.slot != HEAD}
    return adapters, {key: value for key, value in tensors.items() if key.slot == HEAD}
