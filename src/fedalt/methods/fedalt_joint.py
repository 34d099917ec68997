"""An individual LoRA and a mixer beside a global LoRA that trains along, all in one pass."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from fedalt.methods.base import BOTH, NONE, Phase, Slot
from fedalt.methods.held_out import Candidate, HeldOut, HeldOutSettings, corrected, corrections
from fedalt.model.layer import SOFTMAX, SUM, Mixing
from fedalt.model.state import ClientState
from fedalt.names import GLOBAL, INDIVIDUAL, MIXER
from fedalt.registry import METHODS


@METHODS.register("fedalt_joint")
class FedALTJoint(HeldOut):
    """FedALT with a global LoRA, trained by everybody and averaged as FedIT's, in the place of the RoW LoRA.

        y = W0 x + s · [α_L(x) B_L A_L x̃ + α_g(x) B_g A_g x̃],   (α_L, α_g) = softmax(τ G x + (b, 0))

    Each batch updates both LoRAs and the mixer: one pass, not the two of FedDPA-T. With a probability of
    ``slot_dropout`` a client's step has only one of the two, either one, at full weight, so that each learns to work
    alone; the mixer has no gradient then. The global LoRA alone is uploaded, and (τ, b) are chosen as in
    ``fedalt_calibrated``. The individual LoRA never leaves its client; but what does was trained on its rows, where
    FedALT's frozen RoW LoRA holds nothing of them.
    """

    class Settings(HeldOutSettings):
        """FedALT, joint."""

        slot_dropout: float = Field(
            0.5, ge=0, le=1, description="probability that a step trains one of the LoRAs alone, at full weight"
        )

    settings: Settings

    title = "FedALT, joint"
    source = "here"
    section = "fedalt_joint"
    slots = (Slot(INDIVIDUAL, share=NONE), Slot(GLOBAL))
    mixing = SOFTMAX

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """Both LoRAs and the mixer."""
        train = {INDIVIDUAL: BOTH, GLOBAL: BOTH, MIXER: frozenset("G")}
        return (Phase(self.slot_names, train, self.mixing, slot_dropout=self.settings.slot_dropout),)

    @property
    def newcomer(self) -> tuple[tuple[str, ...], Mixing]:
        """The global LoRA, which works alone."""
        return (GLOBAL,), SUM

    @property
    def newcomer_phases(self) -> tuple[Phase, ...]:
        """The individual LoRA and the mixer beside the global LoRA, which stays."""
        return (Phase(self.slot_names, {INDIVIDUAL: BOTH, MIXER: frozenset("G")}, self.mixing),)

    def candidates(self) -> Sequence[Candidate]:
        """Corrections of the mixer."""
        return corrections()

    def candidate(self, state: ClientState, change: Candidate) -> ClientState:
        """A corrected mixer."""
        return corrected(state, change)
