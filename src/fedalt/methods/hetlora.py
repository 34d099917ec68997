"""HetLoRA: ranks that shrink, and means weighed by size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedalt.config.section import Section, Span
from fedalt.methods.algebra import cut, mean_of, norm, padded, refuse_weighting
from fedalt.methods.base import Gathered, Message
from fedalt.methods.unequal import Unequal
from fedalt.model.state import ClientState
from fedalt.names import RANK_AXIS, A, B, Tensors
from fedalt.registry import METHODS
from fedalt.training.optimizer import STEPS


@METHODS.register("hetlora")
class HetLoRA(Unequal):
    """Clients of unequal ranks: the server pads, and weighs uploads by their size; ranks shrink (Cho et al.).

    The loss of a client of rank r has + λ ‖B[:, ⌊γr⌋:]‖ ‖A[⌊γr⌋:]‖ in every layer; when the tail's product is smaller
    after training than it was received, the tail is dropped for good. Uploads are weighed by ‖B_k A_k‖ over all layers.
    λ and the rule for dropping could not be checked against the paper.
    """

    class Settings(Section):
        """HetLoRA."""

        tail: float = Field(0.99, gt=0, le=1, description="share of the rank before the tail that may be pruned")
        decay: Annotated[float, Span(5e-4, 5e-2)] = Field(
            5e-3, ge=0, description="weight of the tail's norm in the loss"
        )
        prune: bool = Field(True, description="drop a tail that has become smaller than it was received")

    settings: Settings

    title = "HetLoRA"
    source = "EMNLP 2024"

    def setup(self) -> None:
        """Ranks shrink, even when all start alike."""
        refuse_weighting(self.config, "hetlora", "whose uploads are weighed by their size")
        self.client_ranks = self.client_ranks or (self.config.lora.r,)

    def penalty(self, trained: Tensors, start: Tensors) -> Tensor:
        """λ times the tail's norm."""
        total = torch.zeros(())
        for key, a in trained.items():
            if key.factor == A:
                b = trained[key._replace(factor=B)]
                present = a.detach().abs().sum(2) > 0
                ranks = (present * torch.arange(1, a.shape[1] + 1, device=a.device)).amax(1)
                first = (self.settings.tail * ranks.double()).floor()  # in fp64, as ``after_training`` counts
                tail = torch.arange(a.shape[1], device=a.device) >= first[:, None]
                total = total + _norm(b * tail[:, None]) * _norm(a * tail[:, :, None])
        return self.settings.decay * total

    def after_training(self, state: ClientState, began: ClientState, round_: int) -> ClientState:
        """Drop a tail that has become smaller."""
        rank = rank_in(state.tensors)
        kept = max(1, int(self.settings.tail * rank))
        if not self.settings.prune or kept == rank or self._tail(state, kept) >= self._tail(began, kept):
            return state
        moments = {
            name: part if name == STEPS else padded(cut(part, kept), part) for name, part in state.optimizer.items()
        }
        return replace(state.with_tensors(padded(cut(state.tensors, kept), state.tensors)), optimizer=moments)

    def _tail(self, state: ClientState, start: int) -> float:
        parts = {}
        for key, value in state.tensors.items():
            axis = RANK_AXIS[key.factor]
            parts[key] = value.narrow(axis, start, value.shape[axis] - start)
        return sum(norm(a, parts[key._replace(factor=B)]) for key, a in parts.items() if key.factor == A)

    def upload(self, state: ClientState) -> Tensors:
        """Factors of the rank that is left."""
        return cut(state.tensors, rank_in(state.tensors))

    def receive(self, state: ClientState, message: Message) -> ClientState:
        """As much of the mean as the client holds."""
        rank = min(rank_in(state.tensors), self.rank_of(state.client))
        return super().receive(state, Message(cut(message.tensors, rank)))

    def client_messages(self, gathered: Gathered) -> Callable[[int, int], Message]:
        """The mean weighed by size, cut to the rank a client last sent."""
        full = self.full(gathered)
        sizes = {client: size(tensors) for client, tensors in full.items()}
        mean = mean_of(full, sizes if sum(sizes.values()) > 0 else dict.fromkeys(full, 1.0))
        left = {client: rank_in(gathered.uploads[client]) for client in full}
        return lambda client, last: Message(cut(mean, left.get(client, self.rank_of(client))))


def rank_in(tensors: Tensors) -> int:
    """Rank of a client's factors without the zeros behind it: the last row of any A that is not zero; at least 1."""
    rows = [value.abs().sum(1).nonzero() for key, value in tensors.items() if key.factor == A]
    return max([1, *(int(row.max()) + 1 for row in rows if len(row))])


def size(tensors: Tensors) -> float:
    """‖B A‖_F over all layers together."""
    norms = [norm(value, tensors[key._replace(factor=B)]) for key, value in tensors.items() if key.factor == A]
    return float(sum(value**2 for value in norms) ** 0.5)


def _norm(values: Tensor) -> Tensor:
    """Per client; its gradient at zero is zero."""
    return (values.flatten(1).square().sum(1) + 1e-24).sqrt()
