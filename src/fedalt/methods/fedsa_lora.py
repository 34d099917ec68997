"""FedSA-LoRA: A shared, B private."""

from __future__ import annotations

from fedalt.methods.base import Method, Slot
from fedalt.names import GLOBAL, A
from fedalt.registry import METHODS


@METHODS.register("fedsa_lora")
class FedSALoRA(Method):
    """Every client trains A and B, and sends A alone, which is averaged; B stays: y = W0 x + s B_k Ā x̃.

    Guo et al. After aggregation Ā meets a B_k that was trained with A_k; scores after
    aggregation are those of that pair, scores before it those of (A_k, B_k).
    """

    title = "FedSA-LoRA"
    source = "ICLR 2025, arXiv 2410.01463"
    slots = (Slot(GLOBAL, share=frozenset(A)),)
