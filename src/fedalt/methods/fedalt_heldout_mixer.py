"""FedALT whose mixers train on rows that no LoRA was trained on."""

from __future__ import annotations

from pydantic import Field

from fedalt.config.section import Section
from fedalt.methods.base import BOTH, Phase
from fedalt.methods.fedalt import FedALT
from fedalt.names import INDIVIDUAL, MIXER
from fedalt.registry import METHODS


@METHODS.register("fedalt_heldout_mixer")
class FedALTHeldOutMixer(FedALT):
    """FedALT; in a round the individual LoRA trains under a mixer that stays, then the mixer on held-out rows alone.

        A_L, B_L ← min f_k(A_L, B_L; G),   then   G ← min f'_k(A_L, B_L; G),   f'_k on the client's held-out rows

    Each goes through its own rows ``local_epochs`` times, so the mixer takes about a ninth of the steps. As CoMiGS
    (arXiv 2409.13931) trains its router; there the two alternate by step. A client without held-out rows, because it
    has one row only, trains its mixer on that.
    """

    class Settings(Section):
        """FedALT, held-out mixer."""

        held_out: float = Field(
            0.1, gt=0, lt=1, description="share of training rows for the mixer, of clients without validation rows"
        )

    settings: Settings

    title = "FedALT, held-out mixer"
    source = "here, after arXiv 2409.13931"
    section = "fedalt_heldout_mixer"

    def setup(self) -> None:
        """Rows are needed."""
        super().setup()
        self.held_out = self.settings.held_out

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """The individual LoRA, then the mixer; one LoRA alone where there is nobody else."""
        individual = Phase(self.slot_names, {INDIVIDUAL: BOTH}, self.mixing)
        mixer = Phase(self.slot_names, {MIXER: frozenset("G")}, self.mixing, held_out=True)
        return (individual, mixer) if self.clients > 1 else (individual,)
