"""FedProx: FedIT with a penalty on the distance from where the round began."""

from __future__ import annotations

from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fedalt.config.section import Section, Span
from fedalt.methods.base import Method, squared_distance
from fedalt.names import Tensors
from fedalt.registry import METHODS


@METHODS.register("fedprox")
class FedProx(Method):
    """Every client trains one LoRA that is held near the mean which it started from; the server averages as in FedIT.

    From the mean w̄ that it has received, every client minimises

        f_k(w) + μ/2 ‖w − w̄‖²,   w = (A, B) of all layers

    and the server averages A and B as FedIT does. The distance is that of the factors, not of the products B A. Its
    gradient μ (w − w̄) is part of what is clipped and of what AdamW sees; the paper's local solver is SGD. With μ = 0
    this is FedIT. Clients do equal work here: the paper's partial work of slow devices has no counterpart.
    """

    class Settings(Section):
        """FedProx."""

        mu: Annotated[float, Span(0.001, 1)] = Field(
            0.01, ge=0, description="weight of the squared distance from the received mean (0: FedIT)"
        )

    settings: Settings

    title = "FedProx"
    source = "MLSys 2020, arXiv 1812.06127"

    def penalty(self, trained: Tensors, start: Tensors) -> Float[Tensor, " k"]:
        """μ/2 ‖w − w̄‖²."""
        return self.settings.mu / 2 * squared_distance(trained, start)
