"""What methods for clients of different ranks under one global LoRA have in common.

Ranks are those of ``lora.ranks``; the scale s = alpha/r is the same for all (alpha in proportion to the rank, as in
FLoRA's code), so nothing changes when a factor crosses ranks. A client's tensors have the largest rank, with zeros
beyond its own, which never get a gradient; what it sends and receives has its own rank.
"""

from __future__ import annotations

import torch

from fedalt.methods.algebra import padded, widened
from fedalt.methods.base import Gathered, Message, Method
from fedalt.model.state import ClientState
from fedalt.names import GLOBAL, A, Tensors


class Unequal(Method):
    """What these methods have in common."""

    heterogeneous = True
    needs_uploads = True

    def rank_of(self, client: int) -> int:
        """A client's rank, r when all have the same."""
        own = super().rank_of(client)
        return self.config.lora.r if own is None else own

    def receive(self, state: ClientState, message: Message) -> ClientState:
        """Directions that the mean does not have keep their A: with A and B both zero they would never train."""
        changes = padded(message.tensors, state.tensors)
        for key, value in changes.items():
            if key.factor == A:
                changes[key] = torch.where(value.abs().sum(1, keepdim=True) > 0, value, state.tensors[key])
        return state.with_tensors(changes)

    def full(self, gathered: Gathered) -> dict[int, Tensors]:
        """All uploads, padded with zeros to the largest rank."""
        most = self.ranks[GLOBAL]
        return {client: widened(gathered.uploads[client], most) for client in gathered.weights}
