"""FedALT whose A's are averaged, so that the RoW LoRA is the exact mean of products."""

from __future__ import annotations

from fedalt.methods.base import Message
from fedalt.methods.fedalt import FedALT, without_own
from fedalt.model.state import ClientState
from fedalt.names import REST_OF_WORLD, A, B, Key
from fedalt.registry import METHODS


@METHODS.register("fedalt_shared_a")
class FedALTSharedA(FedALT):
    """FedALT, with one A for all at the start of a round: everybody's mean, in both of a client's LoRAs.

        A_L^k = A_R^k = Ā,   B_R^k = (B̄ − p_k B_L^k) / (1 − p_k),   so that B_R^k A_R^k = Σ_{m≠k} p_m B_m Ā / (1 − p_k)

    exactly, at FedALT's bytes; FedALT's own RoW LoRA is a product of means. B_L and the mixer stay the client's own. As
    in FedSA-LoRA, what A has learned in common is common, and a client's own A is lost every round.
    """

    title = "FedALT, shared A"
    source = "here"

    def left_out(self, key: Key) -> bool:
        """B alone; A is everybody's."""
        return key.factor == B

    def receive(self, state: ClientState, message: Message) -> ClientState:
        """A ← Ā in both LoRAs, RoW B ← mean of the others'."""
        if self.clients == 1 or message.share >= 1:
            return state
        common = {key: value for key, value in message.tensors.items() if key.factor == A}
        others = {key: value for key, value in message.tensors.items() if key.factor == B}
        rest = without_own(others, state.sent if message.share > 0 else None, message.share)
        rest |= {key._replace(slot=REST_OF_WORLD): value for key, value in common.items()}
        return state.with_tensors({**common, **rest})
