"""What goes between the server and its clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedalt.methods.algebra import Factors
from fedalt.names import A, B, Key, Tensors


@dataclass(frozen=True)
class Message:
    """What the server tells one client at the start of a round.

    Attributes:
        tensors: A mean of uploads, or whatever the method makes of them.
        share: This client's weight p in that mean, 0 when it is not in it (late, failed, or left out on purpose).
    """

    tensors: Tensors
    share: float = 0.0

    @property
    def bytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


@dataclass(frozen=True)
class Gathered:
    """What the server has to make an answer of.

    Attributes:
        uploads: Client → its latest upload that counts.
        weights: Client → its unnormalised weight.
        memory: What the method remembers from round to round.
        round: The round whose uploads came last.
    """

    uploads: Mapping[int, Tensors]
    weights: Mapping[int, float]
    memory: Tensors
    round: int

    def shares(self, without: int | None = None) -> dict[int, float]:
        """Normalised weights, perhaps of everybody but one client."""
        others = {client: weight for client, weight in self.weights.items() if client != without}
        total = sum(others.values())
        return {client: weight / total for client, weight in others.items()}

    def factors(self, slot: str) -> dict[str, dict[int, Factors]]:
        """Module → client → (A, B) of a slot; every upload is read once."""
        uploads = {client: self.uploads[client] for client in self.weights}
        modules = dict.fromkeys(key.module for key in next(iter(uploads.values())))
        return {m: {c: (t[Key(m, slot, A)], t[Key(m, slot, B)]) for c, t in uploads.items()} for m in modules}
