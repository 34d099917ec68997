"""RoLoRA: B and A trained and averaged by turns of rounds."""

from __future__ import annotations

from fedalt.errors import UserError
from fedalt.methods.base import BOTH, Method, Phase
from fedalt.names import GLOBAL, A, B
from fedalt.registry import METHODS


@METHODS.register("rolora")
class RoLoRA(Method):
    """In odd rounds B trains and A is frozen, in even rounds A trains and B is frozen; what is frozen all have alike.

        odd:   Ā = A,  B̄ = Σ_k p_k B_k,   Σ_k p_k B_k A = B̄ Ā
        even:  B̄ = B,  Ā = Σ_k p_k A_k,   Σ_k p_k B A_k = B̄ Ā   exactly

    A ``[r, d_in]``, B ``[d_out, r]``. Chen et al., NeurIPS 2025, arXiv 2502.01755. B has the first turn: it starts at
    zero, where A has no gradient. Everybody must start from one A, so ``lora.init`` must be shared.

    The paper sends the factor that was trained. Here both are sent, as in FedIT, so that a client that has missed
    rounds finds both in the mean, which is bit for bit the old factor where all have it alike; secure sums work, too.
    """

    title = "RoLoRA"
    source = "NeurIPS 2025, arXiv 2502.01755"

    def setup(self) -> None:
        """Refuse start values under which the mean of B would mean nothing."""
        init = self.config.lora.init
        if init != "shared":
            raise UserError(
                f"lora.init: {init} gives clients an A of their own, and rolora averages B first; use shared"
            )

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """B or A alone."""
        return (Phase(self.slot_names, {GLOBAL: frozenset(B if round_ % 2 else A)}),)

    @property
    def newcomer_phases(self) -> tuple[Phase, ...]:
        """Both factors: nothing of a newcomer's is averaged."""
        return (Phase(self.slot_names, {GLOBAL: BOTH}),)
