"""FedALT: an individual LoRA, a frozen rest-of-world LoRA, and a per-token mixer."""

from __future__ import annotations

from torch import Tensor

from fedalt.methods.base import Message, Method, Slot
from fedalt.model.state import ClientState
from fedalt.names import INDIVIDUAL, ROW, Key, Tensors


class FedALT(Method):
    """Federated fine-tuning with adaptive local training, AAAI 2026, arXiv 2503.11880, §3.

        y = W0 x + s · [α_L(x) B_L A_L x̃ + α_R(x) B_R A_R x̃],   (α_L, α_R) = softmax(G x)

    The client trains its individual LoRA (A_L, B_L) and its mixer G, uploads the individual LoRA alone, and never has
    it overwritten. The row LoRA (A_R, B_R) is frozen: the uniform mean of the *others'* individual LoRAs, factor by
    factor. The server may send everybody the same mean; the client takes itself out of it:

        A_R^k = (Ā − p_k A_L^k) / (1 − p_k),   with A_L^k exactly as the server received it

    Differences from the official code: only the individual LoRA is uploaded (the code sends everything and ignores
    the rest), the mean is broadcast, and a federation of one client has no row and no mixer, so it equals Local (the
    code crashes). Mixer row 0 is the individual LoRA here and the row LoRA in the official code.
    """

    name = "fedalt"
    title = "FedALT"
    source = "AAAI 2026, arXiv 2503.11880"
    weighting = "uniform"
    leave_one_out = True

    def __init__(self, clients: int) -> None:
        super().__init__(clients)
        row = Slot(ROW, train=frozenset(), share=frozenset())
        self.slots = (Slot(INDIVIDUAL), row) if clients > 1 else (Slot(INDIVIDUAL),)
        self.mixed = clients > 1

    def install(self, state: ClientState, message: Message) -> ClientState:
        """Row ← mean of the others. When nobody else is in the mean, the row stays as it is."""
        if self.clients == 1 or message.share >= 1:
            return state
        own = state.sent if message.share > 0 else None
        return state.with_tensors(leave_one_out(message.tensors, own, message.share))


def leave_one_out(mean: Tensors, own: Tensors | None, share: float) -> dict[Key, Tensor]:
    """(X̄ − p·X_k)/(1 − p) in fp64, as the row slot's tensors; with ``own`` absent the mean is the row already."""
    row = {}
    for key, value in mean.items():
        rest = value.double() if own is None else (value.double() - share * own[key].double()) / (1 - share)
        row[Key(key.module, ROW, key.factor)] = rest.float()
    return row
