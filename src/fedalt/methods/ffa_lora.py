"""FFA-LoRA: A frozen at its shared start, B averaged."""

from __future__ import annotations

from fedalt.methods.base import Method, Phase, Slot
from fedalt.names import GLOBAL, B


class FFALoRA(Method):
    """A is drawn once from the run's seed, the same for all, and never trained or sent; B is trained and averaged.

        B̄ = Σ_k p_k B_k,   Σ_k p_k B_k A⁰ = B̄ A⁰ exactly

    Sun et al., ICLR 2024, arXiv 2403.12313. Half of FedIT's parameters and bytes on square layers at the same rank.
    The aggregate is exact only if all clients have the same A, so keep ``lora.init`` at shared.
    """

    name = "ffa_lora"
    title = "FFA-LoRA"
    source = "ICLR 2024, arXiv 2403.12313"
    slots = (Slot(GLOBAL, share=frozenset(B)),)

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """B alone."""
        return (Phase(self.slot_names, {GLOBAL: frozenset(B)}),)
