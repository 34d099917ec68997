"""FedIT and fine-tuning: in the last rounds every client goes on alone."""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from fedalt.config.section import Section
from fedalt.errors import UserError
from fedalt.methods.base import Message, Method
from fedalt.model.state import ClientState
from fedalt.registry import METHODS


@METHODS.register("fedit_ft")
class FedITFT(Method):
    """FedAvg and fine-tuning: T − n rounds of FedIT, then n rounds in which client k trains the mean on its own rows.

        Ā, B̄ = FedIT after T − n rounds;   (A_k, B_k) = n · ``local_epochs`` epochs on f_k from (Ā, B̄), kept by k

    The rounds alone take the place of shared ones, so that all methods go through their rows equally often. Each has
    a schedule of its own, as every round has. Nothing is sent in them, so everybody takes part, whatever
    ``federation.fraction`` says; what the server still says, the mean of round T − n, is ignored by whoever has begun
    alone. The baseline of Wang et al., arXiv 1910.10252, and of Cheng et al., arXiv 2108.07313, on LoRA.
    """

    class Settings(Section):
        """FedIT and fine-tuning."""

        alone: int = Field(1, ge=1, description="rounds at the end in which every client trains the mean alone")

    settings: Settings

    title = "FedIT + fine-tuning"
    source = "baseline, arXiv 1910.10252"
    depends_on_rounds = True

    def setup(self) -> None:
        """Refuse to be Local under another name."""
        rounds, alone = self.config.federation.rounds, self.settings.alone
        if alone >= rounds:
            raise UserError(
                f"fedit_ft.alone: {alone} of {rounds} rounds alone leave none for FedIT; raise federation.rounds"
            )

    def _alone(self, round_: int) -> bool:
        return round_ > self.config.federation.rounds - self.settings.alone

    def fraction(self, round_: int) -> float:
        """Everybody trains alone."""
        return 1.0 if self._alone(round_) else super().fraction(round_)

    def uploaded(self, state: ClientState) -> ClientState:
        """Nothing is sent after a round alone."""
        return replace(state, sent=None) if self._alone(state.round) else super().uploaded(state)

    def receive(self, state: ClientState, message: Message) -> ClientState:
        """The mean, until the client has begun alone."""
        return state if self._alone(state.round) else super().receive(state, message)
