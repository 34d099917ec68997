"""FedALT whose mixers are corrected on rows that no LoRA was trained on."""

from __future__ import annotations

from collections.abc import Sequence

from fedalt.methods.fedalt import FedALT
from fedalt.methods.held_out import Candidate, HeldOut, corrected, corrections
from fedalt.model.state import ClientState
from fedalt.registry import METHODS


@METHODS.register("fedalt_calibrated")
class FedALTCalibrated(HeldOut, FedALT):
    """FedALT; when it is to answer, each client's mixer gets a temperature and a shift that held-out rows choose.

        (α_L, α_R) = softmax(τ G x + (b, 0)),   (τ, b) ∈ {1, 0} × {0, ±1, ±2, ±4} or an end: α_L = 1, or α_L = 0

    The mixer is trained on the rows that the individual LoRA has memorised, and trusts that LoRA too much; nothing that
    it sees in training tells it so. One pair for all layers of a client is all that is fitted. Training is FedALT's, on
    the rows that are left, and the mixer as trained is what a client falls back on.
    """

    title = "FedALT, calibrated"
    source = "here"
    section = "fedalt_calibrated"

    def candidates(self) -> Sequence[Candidate]:
        """None where there is no mixer."""
        return corrections() if self.clients > 1 else ()

    def candidate(self, state: ClientState, change: Candidate) -> ClientState:
        """A corrected mixer."""
        return corrected(state, change)
