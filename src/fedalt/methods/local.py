"""Local: every client alone."""

from fedalt.methods.base import NONE, Method, Slot
from fedalt.names import INDIVIDUAL
from fedalt.registry import METHODS


@METHODS.register("local")
class Local(Method):
    """Every client trains its own LoRA on its own rows, as many epochs as in the federated runs, and shares nothing.

    The optimiser and the learning-rate schedule restart every round, as in the federated methods, so that the only
    difference is what comes from others.
    """

    title = "Local"
    source = "baseline"
    slots = (Slot(INDIVIDUAL, share=NONE),)
    heterogeneous = True
