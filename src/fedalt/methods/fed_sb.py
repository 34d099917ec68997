"""Fed-SB: A and B fixed and shared by all, and only a core between them trained and averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedalt.data.encode import Example
from fedalt.errors import UserError
from fedalt.methods.base import Method, Phase, Slot
from fedalt.model.adapted import AdaptedModel
from fedalt.model.layer import Placement
from fedalt.model.state import AdapterShape, ClientState
from fedalt.names import GLOBAL, B, R, Tensors
from fedalt.registry import METHODS


@METHODS.register("fed_sb")
class FedSB(Method):
    """A and B are drawn once, the same for all, and never trained or sent; the core R, r² numbers a layer, is averaged.

        y = W0 x + s B⁰ R A⁰ x̃,   R̄ = Σ_k p_k R_k,   Σ_k p_k B⁰ R_k A⁰ = B⁰ R̄ A⁰ exactly

    A⁰ ``[r, d_in]``, R ``[r, r]``, B⁰ ``[d_out, r]``. Singhal et al., arXiv 2502.15436, and its code. There A⁰, B⁰ and
    the first R are an SVD of a first gradient of all weights, which no method sees here. So this is the code's random
    start: A⁰ as any A, and R = 0 where the code has noise of 1e-5; but B⁰ has orthonormal columns, as that SVD's. A
    step of Adam on R moves the product √(d_out/r) times less than one on B, so it needs a larger learning rate.

    For answers B⁰ R becomes an ordinary B.
    """

    title = "Fed-SB"
    source = "arXiv 2502.15436"
    slots = (Slot(GLOBAL, share=frozenset(R)),)

    def setup(self) -> None:
        """Refuse start values under which the mean of R would mean nothing, or which would be lost."""
        init, model = self.config.lora.init, self.config.model
        if init != "shared":
            raise UserError(
                f"lora.init: {init} gives clients an A of their own, which fed_sb never averages; use shared"
            )
        if model.adapter and model.adapter_as == "start":
            raise UserError("model.adapter_as: start has a B of its own, and fed_sb draws one; use merged")

    def remarks(self) -> Sequence[str]:
        """Refuse ranks beyond a layer's size."""
        for path, (_, size) in self.layers.items():
            if self.widest > size:
                raise UserError(f"lora.r: {self.widest} is more than the {size} outputs of {path}, too many for fed_sb")
        return ()

    @property
    def shape(self) -> AdapterShape:
        """With a core."""
        return replace(super().shape, core=True)

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """R alone."""
        return (Phase(self.slot_names, {GLOBAL: frozenset(R)}),)

    def personalise(
        self,
        model: AdaptedModel,
        states: Sequence[ClientState],
        rows: Mapping[int, Sequence[Example]],
        placement: Placement,
    ) -> list[ClientState]:
        """Ordinary LoRAs, with B = B⁰ R."""
        return [replace(state, tensors=plain(state.tensors)) for state in states]


def plain(tensors: Tensors) -> Tensors:
    """A and B R."""
    cores = {key._replace(factor=B): value for key, value in tensors.items() if key.factor == R}
    kept = {key: value for key, value in tensors.items() if key.factor != R}
    return {key: value @ cores[key] if key in cores else value for key, value in kept.items()}
