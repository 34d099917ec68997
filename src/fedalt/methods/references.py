"""Rows to hold the others against: one model on everybody's rows, and the base model as it is."""

from __future__ import annotations

from fedalt.methods.base import NONE, Method, Phase, Slot
from fedalt.names import GLOBAL
from fedalt.registry import METHODS


@METHODS.register("centralized")
class Centralized(Method):
    """One LoRA trained on the rows of all clients, as if they could be brought together: no federation."""

    title = "Centralized"
    source = "reference"
    centralised = True


@METHODS.register("zero_shot")
class ZeroShot(Method):
    """The base model without training."""

    title = "Zero-shot"
    source = "reference"
    slots = (Slot(GLOBAL, share=NONE),)

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """Nothing trains."""
        return ()
