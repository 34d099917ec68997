"""FedDPA: a global and a local LoRA, weighed for every prompt by its likeness to the client's own rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from fedalt.config.section import Section, Span
from fedalt.data.encode import Example
from fedalt.evaluation.prompt_similarity import anchors
from fedalt.methods.base import BOTH, NONE, Message, Method, Phase, Slot, copied, drawn
from fedalt.model.adapted import AdaptedModel
from fedalt.model.layer import Mixing, Placement
from fedalt.model.state import ClientState
from fedalt.names import ANCHOR, GLOBAL, LOCAL, E, Key
from fedalt.registry import METHODS


class FedDPA(Method):
    """Dual personalising adapters, Yang et al., NeurIPS 2024, arXiv 2403.19211.

    A prompt q of client k is answered with one weight for all of its tokens and layers,

        y = W0 x + s · [c(q) B_l A_l x + (1 − c(q)) B_g A_g x],   c(q) = clamp(λ/S Σ_j cos(e(q), e(x_j)), 0, 1)

    with x_j some of the client's training rows, drawn once from the run's seed, and e the last hidden state of a
    prompt's last token under the local LoRA. With unit vectors the sum is one inner product with their mean, which is
    all that is kept (``anchor``). The official code draws rows anew for every prompt, gives c to the global LoRA
    (``feddpa.weight_target``), and on its batched path sets the weights only after it has generated.
    """

    class Settings(Section):
        """FedDPA-F and FedDPA-T."""

        local_weight: Annotated[float, Span(values=(0.3, 0.5, 0.7))] = Field(
            0.5, ge=0, le=1, description="weight of the local LoRA while it trains (FedDPA-T)"
        )
        samples: int = Field(5, ge=1, description="training rows that a prompt is compared with")
        most: Annotated[float, Span(values=(0.3, 0.5, 0.7, 1.0))] = Field(
            0.5, ge=0, le=1, description="largest weight that similarity gives"
        )
        weight_target: Annotated[Literal["local", "global"], Span(values=("local", "global"))] = Field(
            "local", description="LoRA whose weight grows with similarity (official code: global)"
        )
        embed_with: Literal["local", "global", "base"] = Field(
            "local", description="adapters under which rows are compared"
        )

    settings: Settings

    source = "NeurIPS 2024, arXiv 2403.19211"
    section = "feddpa"
    weighting = "uniform"
    slots = (Slot(GLOBAL), Slot(LOCAL, share=NONE))  # in this order the global LoRA starts as FedIT's

    def setup(self) -> None:
        """How the two LoRAs are weighed for a prompt."""
        embed = {"local": (LOCAL,), "global": (GLOBAL,), "base": ()}[self.settings.embed_with]
        self.mixing = Mixing("instance", most=self.settings.most, target=self.settings.weight_target, embed=embed)

    @property
    def inference(self) -> tuple[tuple[str, ...], Mixing]:
        """Local and global, weighed by prompt."""
        return (LOCAL, GLOBAL), self.mixing

    def personalise(
        self,
        model: AdaptedModel,
        states: Sequence[ClientState],
        rows: Mapping[int, Sequence[Example]],
        placement: Placement,
    ) -> list[ClientState]:
        """Add what prompts are compared with."""
        count, seed = self.settings.samples, self.config.seed
        chosen = [drawn(rows[state.client], count, seed, "anchor", state.client) for state in states]
        prompts = [[example.input for example in mine] for mine in chosen]
        found = anchors(model, states, prompts, placement)
        return [state.with_tensors({Key("", ANCHOR, E): anchor}) for state, anchor in zip(states, found, strict=True)]


@METHODS.register("feddpa_t")
class FedDPAT(FedDPA):
    """FedDPA-T: from the second round on, each client first trains its local LoRA beside the frozen global one.

        y = W0 x + s · [a B_l A_l x̃ + (1 − a) sg(B_g A_g x̃)],   a = ``feddpa.local_weight``

    (sg: no gradient passes). Then it trains the global LoRA on its own, as in FedIT, and sends that. Both phases go
    through the rows ``local_epochs`` times. An absent client keeps its local LoRA (the official code starts it anew).
    """

    title = "FedDPA-T"

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """Global alone in the first round, then local and global."""
        alone = Phase((GLOBAL,), {GLOBAL: BOTH})
        if round_ == 1:
            return (alone,)
        a = self.settings.local_weight
        local = Phase((LOCAL, GLOBAL), {LOCAL: BOTH}, Mixing("fixed", (a, 1 - a)), detached=(GLOBAL,))
        return local, alone

    @property
    def newcomer_phases(self) -> tuple[Phase, ...]:
        """The local LoRA beside the global one."""
        return self.phases(2)[:1]


@METHODS.register("feddpa_f")
class FedDPAF(FedDPA):
    """FedDPA-F: FedIT on the global LoRA; in the last round, each client makes it its local one and trains that alone.

    The private phase takes the place of a round, so that all methods go through their rows equally often. Until then
    both LoRAs are the same. Nothing is sent in it, so everybody takes part, whatever ``federation.fraction`` says.
    """

    title = "FedDPA-F"
    depends_on_rounds = True

    def _last(self, round_: int) -> bool:
        return round_ == self.config.federation.rounds

    def fraction(self, round_: int) -> float:
        """Everybody has a private phase."""
        return 1.0 if self._last(round_) else super().fraction(round_)

    @property
    def newcomer_phases(self) -> tuple[Phase, ...]:
        """The private phase."""
        return self.phases(self.config.federation.rounds)

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """Global alone; in the end, local alone."""
        slot = LOCAL if self._last(round_) else GLOBAL
        return (Phase((slot,), {slot: BOTH}),)

    def before_training(self, state: ClientState, round_: int) -> ClientState:
        """The local LoRA starts as the global one."""
        return copied(state, GLOBAL, LOCAL) if self._last(round_) else state

    def after_training(self, state: ClientState, began: ClientState, round_: int) -> ClientState:
        """Until the end there is one LoRA."""
        return state if self._last(round_) else copied(state, GLOBAL, LOCAL)

    def uploaded(self, state: ClientState) -> ClientState:
        """Nothing is sent after the private phase."""
        return replace(state, sent=None) if self._last(state.round) else super().uploaded(state)

    def receive(self, state: ClientState, message: Message) -> ClientState:
        """The mean becomes the global LoRA, and the local one, too, before the private phase."""
        installed = super().receive(state, message)
        return installed if self._last(state.round) else copied(installed, GLOBAL, LOCAL)
