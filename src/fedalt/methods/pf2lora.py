"""PF2LoRA: a common LoRA and a small private one, trained as two levels."""

from __future__ import annotations

from math import ceil

from fedalt.config import RunConfig
from fedalt.methods.base import BOTH, NONE, Method, Phase, Slot
from fedalt.model.mixing import SUM, Mixing
from fedalt.names import GLOBAL, PRIVATE
from fedalt.training.rules import Bilevel

_SGD = 100
"""A step of SGD in steps of AdamW, whose size does not depend on the gradient's. Measured once, on tinyworld."""


class PF2LoRA(Method):
    """y = W0 x + s (B A + D_k C_k) x̃, with A, B common and averaged and C_k, D_k of rank r̃ < r never sent.

        min over x = {A, B} of 1/K Σ_k f_k(x, y_k*(x)),   y_k*(x) ∈ argmin over y of f_k(x, y)

    Each step takes y by SGD and x by AdamW with the gradient at the new y (``training/rules.py``), both on the same
    rows. Hao et al., arXiv 2503.03920. The paper's exact hypergradient and scales could not be checked: the default is
    first order, ``unrolled`` looks through y's step.
    """

    name = "pf2lora"
    title = "PF2LoRA"
    source = "arXiv 2503.03920"
    weighting = "uniform"
    slots = (Slot(GLOBAL), Slot(PRIVATE, share=NONE))

    def __init__(self, clients: int, config: RunConfig | None = None) -> None:
        super().__init__(clients, config)
        self.options = self.config.pf2lora
        r = self.config.lora.r
        own = self.options.private_scale == "own_rank"
        self.mixing = Mixing("fixed", (1.0, r / self.ranks(r)[PRIVATE])) if own else SUM

    def ranks(self, r: int) -> dict[str, int]:
        """r, and a quarter of it, rounded up."""
        return {GLOBAL: r, PRIVATE: self.options.private_rank or ceil(r / 4)}

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """Both LoRAs, on two levels."""
        rule = Bilevel(PRIVATE, self.options.private_lr, self.options.hypergrad == "unrolled", factor=_SGD)
        return (Phase(self.slot_names, {GLOBAL: BOTH, PRIVATE: BOTH}, self.mixing, rule=rule),)
