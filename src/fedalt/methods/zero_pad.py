"""FedIT on factors of different ranks: padding with zeros."""

from __future__ import annotations

from collections.abc import Callable

from fedalt.methods.algebra import cut, mean_of
from fedalt.methods.base import Gathered, Message
from fedalt.methods.unequal import Unequal
from fedalt.registry import METHODS


@METHODS.register("zero_pad")
class ZeroPad(Unequal):
    """FedIT on factors padded with zeros to the largest rank; every client takes what it can hold.

    Zeros dilute what only clients of high rank have. The baseline of FLoRA's paper and of HetLoRA's.
    """

    title = "FedIT (zero-padded)"
    source = "baseline of arXiv 2409.05976"

    def client_messages(self, gathered: Gathered) -> Callable[[int, int], Message]:
        """The mean, cut to the client's rank."""
        mean = mean_of(self.full(gathered), gathered.weights)
        return lambda client, last: Message(cut(mean, self.rank_of(client)))
