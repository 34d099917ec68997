"""FDLoRA: a personal and a shared LoRA, an optimiser on the server, and a fusion found without gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fedalt.config.section import Section, Span
from fedalt.data.batches import collate
from fedalt.data.encode import Example
from fedalt.methods.algebra import mean_of
from fedalt.methods.base import BOTH, NONE, Gathered, Message, Method, Phase, Slot, copied, drawn
from fedalt.model.adapted import AdaptedModel
from fedalt.model.layer import SUM, Mixing, Placement
from fedalt.model.state import ClientState
from fedalt.names import FUSED, GLOBAL, PERSONAL, Key, Tensors
from fedalt.registry import METHODS
from fedalt.training.loss import client_losses

BOUND = 3.0
"""w1 lies in [0, 3] and w2 in [−3, 3]: with both signs turned, the products are the same."""
_KNOWN = ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5))
_MOVES = ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))


def best_pairs(
    cost: Callable[[Float[Tensor, "k 2"]], Float[Tensor, " k"]], clients: int, budget: int
) -> Float[Tensor, "k 2"]:
    """Minimise every client's own cost with ``budget`` calls of ``cost``, which takes a pair for each client.

    First (1, 0), (0, 1) and (½, ½); then a square grid with about half of what is left; then steps along the axes from
    the best pair so far, which are halved when none of the four is better. Of equal costs, what was tried first stays.
    """
    side = max(2, int(((budget - len(_KNOWN)) / 4) ** 0.5))
    ranges = ((0.0, side), (-BOUND, 2 * side - 1))
    grid = torch.cartesian_prod(*(torch.linspace(low, BOUND, n, dtype=torch.float64) for low, n in ranges))
    tried = [torch.tensor(_KNOWN, dtype=torch.float64), grid]
    lowest = torch.tensor([0.0, -BOUND], dtype=torch.float64)
    best = torch.zeros(clients, 2, dtype=torch.float64)
    value = torch.full((clients,), torch.inf, dtype=torch.float64)
    left = budget

    def attempt(pairs: Tensor) -> Tensor:
        nonlocal best, value, left
        left -= 1
        new = cost(pairs)
        better = new < value
        best, value = torch.where(better[:, None], pairs, best), torch.where(better, new, value)
        return better

    for pair in torch.cat(tried)[:budget]:
        attempt(pair.expand(clients, 2))
    step = torch.full((clients, 1), BOUND / (side - 1) / 2, dtype=torch.float64)
    while left:
        start, moved = best, torch.zeros(clients, dtype=torch.bool)
        for move in _MOVES[:left]:
            moved |= attempt((start + step * torch.tensor(move, dtype=torch.float64)).clamp(lowest, -lowest.min()))
        step = torch.where(moved[:, None], step, step / 2)
    return best


VELOCITY = "velocity"


@METHODS.register("fdlora")
class FDLoRA(Method):
    """Each client answers with a weighted sum of its personal LoRA and a LoRA that all share.

    Stage 1 of FDLoRA (Qi et al.) is the first round: each client trains its personal LoRA θ_p; their mean is the first
    shared LoRA θ_s.
    Stage 2 is every further round: a client trains a copy θ_s^k of θ_s, and every ``sync_every`` rounds keeps it as its
    θ_p. The server takes a step of Nesterov's method on the mean change, as in DiLoCo:

        Δ = mean_k(θ_s − θ_s^k),   v ← μ v + Δ,   θ_s ← θ_s − η (Δ + μ v)

    Stage 3, whenever a model is to answer: scalars w for each client, with Â = w1 A_p + w2 A_s, B̂ = w1 B_p + w2 B_s,
    that minimise the loss on a few of its own training rows + penalty · (|w1| + |w2|)/2 over [0, 3] × [−3, 3].

    The source's constants and where it takes its few rows from could not be checked (FedALT's authors say: from the
    server); here they are the client's own, and the search is a grid and then a pattern search with a budget that is
    the same for all. A client that joins after the first round has no trained θ_p until the next sync.
    """

    class Settings(Section):
        """FDLoRA."""

        outer_lr: Annotated[float, Span(0.2, 1)] = Field(
            0.7, gt=0, description="server's learning rate on the mean change (DiLoCo: .7)"
        )
        outer_momentum: Annotated[float, Span(values=(0.0, 0.5, 0.9))] = Field(
            0.9, ge=0, lt=1, description="Nesterov momentum of the server (DiLoCo: .9)"
        )
        sync_every: Annotated[int, Span(values=(1, 2, 5))] = Field(
            5, ge=1, description="rounds after which the personal LoRA becomes the client's shared one"
        )
        few_shot: int = Field(16, ge=1, description="rows of a client on which the fusion weights are found")
        budget: int = Field(40, ge=9, description="evaluations of the fusion weights")
        penalty: float = Field(0.05, ge=0, description="weight of (|w1| + |w2|)/2 beside the loss")

    settings: Settings

    title = "FDLoRA"
    source = "arXiv 2406.07925"
    weighting = "uniform"
    has_server_state = True
    slots = (Slot(PERSONAL, share=NONE), Slot(GLOBAL))

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """Personal in the first round, shared in all others."""
        slot = PERSONAL if round_ == 1 else GLOBAL
        return (Phase((slot,), {slot: BOTH}),)

    def remarks(self) -> Sequence[str]:
        """Says where the personal LoRA stays as the first round left it."""
        rounds, every = self.config.federation.rounds, self.settings.sync_every
        never = (
            f"fdlora.sync_every: {every} never comes to pass in {rounds} rounds: the personal LoRA trains in the first"
        )
        return [f"{never} round only"] if rounds <= every else []

    @property
    def newcomer_phases(self) -> tuple[Phase, ...]:
        """The personal LoRA; it is fused with the shared one."""
        return self.phases(1)

    @property
    def newcomer(self) -> tuple[tuple[str, ...], Mixing]:
        """The shared LoRA."""
        return (GLOBAL,), SUM

    def after_training(self, state: ClientState, began: ClientState, round_: int) -> ClientState:
        """The first round's personal LoRA is what is shared; later the shared one becomes personal now and then."""
        if round_ == 1:
            return copied(state, PERSONAL, GLOBAL)
        return copied(state, GLOBAL, PERSONAL) if (round_ - 1) % self.settings.sync_every == 0 else state

    def server_update(self, gathered: Gathered) -> Tensors:
        """The outer step."""
        mean = mean_of(gathered.uploads, gathered.weights)
        if not gathered.memory:
            return {**mean, **{key._replace(slot=VELOCITY): torch.zeros_like(value) for key, value in mean.items()}}
        memory: dict[Key, Tensor] = {}
        eta, mu = self.settings.outer_lr, self.settings.outer_momentum
        for key, value in mean.items():
            old, speed = gathered.memory[key], key._replace(slot=VELOCITY)
            delta = old - value
            memory[speed] = mu * gathered.memory[speed] + delta
            memory[key] = old - eta * (delta + mu * memory[speed])
        return memory

    def client_messages(self, gathered: Gathered) -> Callable[[int, int], Message]:
        """θ_s for everybody."""
        message = Message({key: value for key, value in gathered.memory.items() if key.slot == GLOBAL})
        return lambda client, last: message

    @property
    def inference(self) -> tuple[tuple[str, ...], Mixing]:
        """The fused LoRA alone."""
        return (FUSED,), SUM

    def personalise(
        self,
        model: AdaptedModel,
        states: Sequence[ClientState],
        rows: Mapping[int, Sequence[Example]],
        placement: Placement,
    ) -> list[ClientState]:
        """AdaFusion."""
        count, seed = self.settings.few_shot, self.config.seed
        few = [drawn(rows[state.client], count, seed, "few_shot", state.client) for state in states]
        batch = collate(few).to(model.device)

        @torch.no_grad()
        def cost(w: Tensor) -> Tensor:
            model.load([fused(state, pair) for state, pair in zip(states, w.tolist(), strict=True)], placement)
            losses = client_losses(model, batch).double().cpu()
            return losses + self.settings.penalty * w.abs().sum(1) / 2

        found = best_pairs(cost, len(states), self.settings.budget).tolist()
        return [fused(state, pair) for state, pair in zip(states, found, strict=True)]


def fused(state: ClientState, w: Sequence[float]) -> ClientState:
    """The state with Â = w1 A_p + w2 A_s and B̂ alike."""
    personal = {key: value for key, value in state.tensors.items() if key.slot == PERSONAL}
    changes = {
        key._replace(slot=FUSED): w[0] * value + w[1] * state.tensors[key._replace(slot=GLOBAL)]
        for key, value in personal.items()
    }
    return state.with_tensors(changes)
