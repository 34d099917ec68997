"""FFA-LoRA: A frozen at its shared start, B averaged."""

from __future__ import annotations

from fedalt.errors import UserError
from fedalt.methods.base import Method, Phase, Slot
from fedalt.names import GLOBAL, B
from fedalt.registry import METHODS


@METHODS.register("ffa_lora")
class FFALoRA(Method):
    """A is drawn once from the run's seed, the same for all, and never trained or sent; B is trained and averaged.

        B̄ = Σ_k p_k B_k,   Σ_k p_k B_k A⁰ = B̄ A⁰ exactly

    Sun et al., ICLR 2024, arXiv 2403.12313. Half of FedIT's parameters and bytes on square layers at the same rank.
    A mean of B's for different A's would mean nothing, so ``lora.init`` must be shared.
    """

    title = "FFA-LoRA"
    source = "ICLR 2024, arXiv 2403.12313"
    slots = (Slot(GLOBAL, share=frozenset(B)),)

    def setup(self) -> None:
        """Refuse start values under which the mean of B would mean nothing."""
        init = self.config.lora.init
        if init != "shared":
            raise UserError(
                f"lora.init: {init} gives clients an A of their own, which ffa_lora never averages; use shared"
            )

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """B alone."""
        return (Phase(self.slot_names, {GLOBAL: frozenset(B)}),)
