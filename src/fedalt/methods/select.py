"""Select: for every client the better of training alone and of averaging, or both of them, by held-out rows."""

from __future__ import annotations

from collections.abc import Sequence

from fedalt.methods.base import BOTH, NONE, Phase, Slot
from fedalt.methods.held_out import Candidate, HeldOut, weighed
from fedalt.model.state import ClientState
from fedalt.names import GLOBAL, INDIVIDUAL
from fedalt.registry import METHODS


@METHODS.register("select")
class Select(HeldOut):
    """Each client trains FedIT's LoRA, which it uploads, and one of its own, and then answers with one or with both.

        y = W0 x + s · [w B_L A_L x + (1 − w) B_g A_g x],   w = ½, or 1 or 0 where held-out rows say so

    With w = 1 this is Local, with w = 0 FedIT (bit for bit where models have no head). The static mean of both is what
    a client falls back on: cross-entropy is convex in logits, so where these are about linear in the LoRA, the mean
    loses no more than the mean loss of the two, and mostly less. Choosing between alone and averaged is minimax
    optimal up to constants (Chen et al., arXiv 2103.01901). A round costs two of FedIT's.
    """

    title = "Select"
    source = "here, after arXiv 2103.01901"
    section = "select"
    slots = (Slot(GLOBAL), Slot(INDIVIDUAL, share=NONE))

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """Global, then individual; each is alone on the base."""
        return Phase((GLOBAL,), {GLOBAL: BOTH}), Phase((INDIVIDUAL,), {INDIVIDUAL: BOTH})

    @property
    def newcomer_phases(self) -> tuple[Phase, ...]:
        """The individual LoRA."""
        return self.phases(1)[1:]

    def candidates(self) -> Sequence[Candidate]:
        """The mean, Local, FedIT."""
        return [{INDIVIDUAL: w, GLOBAL: 1 - w} for w in (0.5, 1.0, 0.0)]

    def candidate(self, state: ClientState, change: Candidate) -> ClientState:
        """Products times their weights."""
        return weighed(state, change)
