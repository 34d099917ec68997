"""PF2LoRA: a common LoRA and a small private one, trained as two levels."""

from __future__ import annotations

from math import ceil
from typing import Annotated, Literal

from pydantic import Field

from fedalt.config.section import Section, Span
from fedalt.methods.base import BOTH, NONE, Method, Phase, Slot
from fedalt.model.layer import SUM, Mixing
from fedalt.names import GLOBAL, PRIVATE
from fedalt.registry import METHODS
from fedalt.training.optimizer import Bilevel

_SGD = 100
"""A step of SGD in steps of AdamW, whose size does not depend on the gradient's. Measured once, on tinyworld."""


@METHODS.register("pf2lora")
class PF2LoRA(Method):
    """Every client trains a common LoRA, which is averaged, and a private one of lower rank, which is never sent.

        y = W0 x + s (B A + D_k C_k) x̃,   rank of D_k C_k: r̃ < r

        min over x = {A, B} of 1/K Σ_k f_k(x, y_k*(x)),   y_k*(x) ∈ argmin over y of f_k(x, y)

    Each step takes y by SGD and x by AdamW with the gradient at the new y (``training/optimizer.py``), both on the same
    rows. Hao et al., arXiv 2503.03920. The paper's exact hypergradient and scales could not be checked: the default is
    first order, ``unrolled`` looks through y's step.
    """

    class Settings(Section):
        """PF2LoRA."""

        private_rank: int | None = Field(
            None, ge=1, description="rank of the private LoRA; lora.r / 4, rounded up, when not given"
        )
        private_lr: Annotated[float | None, Span(0.01, 10)] = Field(
            None,
            gt=0,
            description="SGD step of the private LoRA; 100 times training.lr if not given: AdamW's steps are not SGD's",
        )
        hypergrad: Annotated[Literal["first_order", "unrolled"], Span(values=("first_order", "unrolled"))] = Field(
            "first_order", description="whether the common LoRA's gradient looks through the private LoRA's step"
        )
        private_scale: Literal["same", "own_rank"] = Field(
            "same", description="alpha over lora.r, or over private_rank"
        )

    settings: Settings

    title = "PF2LoRA"
    source = "arXiv 2503.03920"
    weighting = "uniform"
    slots = (Slot(GLOBAL), Slot(PRIVATE, share=NONE))

    def setup(self) -> None:
        """How the two LoRAs are weighed."""
        lora, own = self.config.lora, self.settings.private_scale == "own_rank"
        larger = (lora.r / self.ranks[PRIVATE]) ** (0.5 if lora.rslora else 1)
        self.mixing = Mixing("fixed", (1.0, larger)) if own else SUM

    @property
    def ranks(self) -> dict[str, int]:
        """r, and a quarter of it, rounded up."""
        r = self.config.lora.r
        return {GLOBAL: r, PRIVATE: self.settings.private_rank or ceil(r / 4)}

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """Both LoRAs, on two levels."""
        rule = Bilevel(PRIVATE, self.settings.private_lr, self.settings.hypergrad == "unrolled", factor=_SGD)
        return (Phase(self.slot_names, {GLOBAL: BOTH, PRIVATE: BOTH}, self.mixing, rule=rule),)
