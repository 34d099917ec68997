"""Ditto: a global LoRA as FedIT has it, and a personal one that is held near it."""

from __future__ import annotations

from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fedalt.config.section import Section, Span
from fedalt.methods.base import BOTH, NONE, Message, Method, Phase, Slot, copied, squared_distance
from fedalt.model.layer import SUM, Mixing
from fedalt.model.state import ClientState
from fedalt.names import GLOBAL, PERSONAL, Tensors
from fedalt.registry import METHODS


@METHODS.register("ditto")
class Ditto(Method):
    """Each client keeps a personal LoRA, pulled towards the global LoRA that all of them average.

    In every round of Ditto (Li et al.) a client receives w̄ and trains two LoRAs on its own rows,

        w:  min f_k(w) from w̄, which it uploads,   then   v_k:  min f_k(v) + λ/2 ‖v − w̄‖², which it keeps

    each for ``local_epochs`` epochs, so a round costs two of FedIT's. v_k alone answers. The global LoRA is FedIT's,
    bit for bit. The distance is that of the factors A and B, so v_k starts as the first w̄ that the client has: with
    an A of its own, the penalty would measure nothing but two draws. With λ = 0 nothing of the others reaches v_k
    beyond that start. The paper's local solver is SGD; here the penalty's gradient goes through AdamW.
    """

    class Settings(Section):
        """Ditto."""

        weight: Annotated[float, Span(0.01, 1)] = Field(
            0.1, ge=0, description="lambda, the pull of the personal LoRA to the global one (0: it trains alone)"
        )

    settings: Settings

    title = "Ditto"
    source = "ICML 2021, arXiv 2012.04221"
    slots = (Slot(GLOBAL), Slot(PERSONAL, share=NONE))

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """Global, then personal; each is alone on the base."""
        return Phase((GLOBAL,), {GLOBAL: BOTH}), Phase((PERSONAL,), {PERSONAL: BOTH})

    def before_training(self, state: ClientState, round_: int) -> ClientState:
        """In a client's first round the personal LoRA starts as the global one."""
        return self._begun(state)

    def receive(self, state: ClientState, message: Message) -> ClientState:
        """W ← w̄; so is the personal LoRA of a client that has not trained yet."""
        return self._begun(super().receive(state, message))

    def _begun(self, state: ClientState) -> ClientState:
        return copied(state, GLOBAL, PERSONAL) if state.round == 0 else state

    def penalty(self, trained: Tensors, start: Tensors) -> Float[Tensor, " k"] | None:
        """λ/2 ‖v − w̄‖² while the personal LoRA trains; w̄ is the global LoRA as the round began."""
        if not any(key.slot == PERSONAL for key in trained):
            return None
        received = {key: start[key._replace(slot=GLOBAL) if key.slot == PERSONAL else key] for key in trained}
        return self.settings.weight / 2 * squared_distance(trained, received)

    @property
    def newcomer_phases(self) -> tuple[Phase, ...]:
        """The personal LoRA, from the global one."""
        return self.phases(1)[1:]

    @property
    def inference(self) -> tuple[tuple[str, ...], Mixing]:
        """The personal LoRA alone."""
        return (PERSONAL,), SUM
