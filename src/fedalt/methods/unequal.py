"""Clients of different ranks under one global LoRA: padding, stacking, decomposing.

Ranks are those of ``lora.ranks``; the scale s = alpha/r is the same for all (alpha in proportion to the rank, as in
FLoRA's code), so nothing changes when a factor crosses ranks. A client's tensors have the largest rank, with zeros
beyond its own, which never get a gradient; what it sends and receives has its own rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedalt.config import RunConfig
from fedalt.methods.base import Gathered, Message, Method, Phase, cut, padded
from fedalt.methods.mean import mean_of, refuse_weighting
from fedalt.methods.products import norm, stacked, truncated
from fedalt.model.state import AdapterShape, ClientState
from fedalt.names import GLOBAL, MERGED, A, B, Key, Tensors, W
from fedalt.seeding import rng
from fedalt.training.rules import Plain, Trainable


class Unequal(Method):
    """What these methods have in common."""

    heterogeneous = True
    individually = True

    def rank_of(self, client: int) -> int:
        """A client's rank, r when all have the same."""
        own = super().rank_of(client)
        return self.config.lora.r if own is None else own

    def install(self, state: ClientState, message: Message) -> ClientState:
        """Directions that the mean does not have keep their A: with A and B both zero they would never train."""
        changes = padded(message.tensors, state.tensors)
        for key, value in changes.items():
            if key.factor == A:
                changes[key] = torch.where(value.abs().sum(1, keepdim=True) > 0, value, state.tensors[key])
        return state.with_tensors(changes)

    def full(self, gathered: Gathered) -> dict[int, Tensors]:
        """All uploads, padded with zeros to the largest rank."""
        most = self.ranks(self.config.lora.r)[GLOBAL]
        return {client: _widened(gathered.uploads[client], most) for client in gathered.weights}


class ZeroPad(Unequal):
    """FedIT on factors padded with zeros to the largest rank; every client takes what it can hold.

    Zeros dilute what only clients of high rank have. The baseline of FLoRA's paper and of HetLoRA's.
    """

    name = "zero_pad"
    title = "FedIT (zero-padded)"
    source = "baseline of arXiv 2409.05976"

    def answers(self, gathered: Gathered) -> Callable[[int, int], Message]:
        """The mean, cut to the client's rank."""
        mean = mean_of(self.full(gathered), gathered.weights)
        return lambda client, last: Message(cut(mean, self.rank_of(client)))


class HetLoRA(Unequal):
    """Cho et al., EMNLP 2024: padding with weights by size, and ranks that shrink.

    The loss of a client of rank r has + λ ‖B[:, ⌊γr⌋:]‖ ‖A[⌊γr⌋:]‖ in every layer; when the tail's product is smaller
    after training than it was received, the tail is dropped for good. Uploads are weighed by ‖B_k A_k‖ over all layers.
    λ and the rule for dropping could not be checked against the paper.
    """

    name = "hetlora"
    title = "HetLoRA"
    source = "EMNLP 2024"

    def __init__(self, clients: int, config: RunConfig | None = None) -> None:
        super().__init__(clients, config)
        refuse_weighting(self.config, "hetlora", "whose uploads are weighed by their size")
        self.options = self.config.hetlora
        self.client_ranks = self.client_ranks or (self.config.lora.r,)  # it shrinks, even when all start alike

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """FedIT's, with the tail's norm in the loss."""
        (phase,) = super().phases(round_)
        return (Phase(phase.slots, phase.train, rule=Plain(self._penalty)),)

    def _penalty(self, trainable: Trainable) -> Tensor:
        total = torch.zeros(())
        for key, a in trainable.items():
            if key.factor == A:
                b = trainable[key._replace(factor=B)]
                present = a.detach().abs().sum(2) > 0
                ranks = (present * torch.arange(1, a.shape[1] + 1, device=a.device)).amax(1)
                start = (self.options.tail * ranks.double()).floor()  # in fp64, as ``after`` counts
                tail = torch.arange(a.shape[1], device=a.device) >= start[:, None]
                total = total + _norm(b * tail[:, None]) * _norm(a * tail[:, :, None])
        return self.options.decay * total

    def after(self, state: ClientState, began: ClientState, round_: int) -> ClientState:
        """Drop a tail that has become smaller."""
        rank = rank_in(state.tensors)
        kept = max(1, int(self.options.tail * rank))
        if not self.options.prune or kept == rank or self._tail(state, kept) >= self._tail(began, kept):
            return state
        return state.with_tensors(padded(cut(state.tensors, kept), state.tensors))

    def _tail(self, state: ClientState, start: int) -> float:
        parts = {
            k: v.narrow(1 if k.factor == B else 0, start, v.shape[k.factor == B] - start)
            for k, v in state.tensors.items()
        }
        return sum(norm(a, parts[key._replace(factor=B)]) for key, a in parts.items() if key.factor == A)

    def upload(self, state: ClientState) -> Tensors:
        """Factors of the rank that is left."""
        return cut(state.tensors, rank_in(state.tensors))

    def install(self, state: ClientState, message: Message) -> ClientState:
        """As much of the mean as the client holds."""
        rank = min(rank_in(state.tensors), self.rank_of(state.client))
        return super().install(state, Message(cut(message.tensors, rank)))

    def answers(self, gathered: Gathered) -> Callable[[int, int], Message]:
        """The mean weighed by size, cut to the rank a client last sent."""
        full = self.full(gathered)
        sizes = {client: size(tensors) for client, tensors in full.items()}
        mean = mean_of(full, sizes if sum(sizes.values()) > 0 else dict.fromkeys(full, 1.0))
        left = {client: rank_in(gathered.uploads[client]) for client in full}
        return lambda client, last: Message(cut(mean, left.get(client, self.rank_of(client))))


class FlexLoRA(Unequal):
    """Bai et al., NeurIPS 2024: the exact mean of products, decomposed for every client's rank.

    Σ p_k B_k A_k = U Σ Vᵀ,   B_j = U_r Σ_r,   A_j = V_rᵀ
    """

    name = "flexlora"
    title = "FlexLoRA"
    source = "NeurIPS 2024, arXiv 2402.11505"

    def answers(self, gathered: Gathered) -> Callable[[int, int], Message]:
        """The best approximation of the client's rank."""
        layers = gathered.factors(GLOBAL)
        bests = {module: truncated(parts) for module, parts in layers.items()}
        shares = gathered.shares()

        def answer(client: int, last: int) -> Message:
            tensors: dict[Key, Tensor] = {}
            for module, best in bests.items():
                a, b = best(shares, self.rank_of(client))
                roots = b.norm(dim=0)  # both factors hold the roots of the singular values
                tensors[Key(module, GLOBAL, A)] = torch.where(roots[:, None] > 0, a / roots[:, None], 0).float()
                tensors[Key(module, GLOBAL, B)] = (b * roots).float()
            return Message(tensors)

        return answer


class FLoRA(Unequal):
    """Wang et al., NeurIPS 2024, arXiv 2409.05976: stacks of all LoRAs are merged into everybody's base.

        A = [p_1 A_1; …; p_n A_n],   B = [B_1, …, B_n],   W0 ← W0 + s B A,   B A = Σ p_k B_k A_k

    A new LoRA starts on the new base: A random, B zero. The merged part is kept beside the frozen base, dense and for
    each client, so that quantised bases and other methods are not disturbed; the message is the stack, or all stacks
    that an absent client has missed.
    """

    name = "flora"
    title = "FLoRA"
    source = "NeurIPS 2024, arXiv 2409.05976"
    stateful = True

    def shape(self, r: int, layers: Mapping[str, tuple[int, int]]) -> AdapterShape:
        """With room for what is merged."""
        return replace(super().shape(r, layers), merged=True)

    def serve(self, gathered: Gathered) -> Tensors:
        """Remember this round's stack."""
        shares, memory = gathered.shares(), dict(gathered.memory)
        for module, parts in gathered.factors(GLOBAL).items():
            a, b = stacked([(*parts[c], share) for c, share in shares.items()])
            memory[Key(module, f"round{gathered.round}", A)] = a
            memory[Key(module, f"round{gathered.round}", B)] = b
        return memory

    def answers(self, gathered: Gathered) -> Callable[[int, int], Message]:
        """All stacks since the client last took part."""
        rounds = {key: int(key.slot.removeprefix("round")) for key in gathered.memory}

        def answer(client: int, last: int) -> Message:
            return Message({key: value for key, value in gathered.memory.items() if rounds[key] >= last})

        return answer

    def install(self, state: ClientState, message: Message) -> ClientState:
        """Merge, and start a new LoRA."""
        changes: dict[Key, Tensor] = {}
        for key, a in message.tensors.items():
            if key.factor == A:
                merged = Key(key.module, MERGED, W)
                product = message.tensors[key._replace(factor=B)].double() @ a.double()
                changes[merged] = changes.get(merged, state.tensors[merged].double()) + product
        changes = {key: value.float() for key, value in changes.items()}
        rank, seed = self.rank_of(state.client), self.config.seed
        for key, old in state.tensors.items():
            if key.slot == GLOBAL:
                changes[key] = torch.zeros_like(old)
                if key.factor == A:
                    draw = torch.rand(
                        rank, old.shape[1], generator=rng(seed, "init", state.round, state.client, key.module)
                    )
                    changes[key][:rank] = (2 * draw - 1) / old.shape[1] ** 0.5
        return state.with_tensors(changes)


def rank_in(tensors: Tensors) -> int:
    """Rank of a client's factors without the zeros behind it: the last row of any A that is not zero; at least 1."""
    rows = [value.abs().sum(1).nonzero() for key, value in tensors.items() if key.factor == A]
    return max([1, *(int(row.max()) + 1 for row in rows if len(row))])


def size(tensors: Tensors) -> float:
    """‖B A‖_F over all layers together."""
    norms = [norm(value, tensors[key._replace(factor=B)]) for key, value in tensors.items() if key.factor == A]
    return float(sum(value**2 for value in norms) ** 0.5)


def _widened(tensors: Tensors, rank: int) -> Tensors:
    def pad(key: Key, value: Tensor) -> Tensor:
        short = rank - value.shape[key.factor == B]
        return torch.nn.functional.pad(value, (0, short) if key.factor == B else (0, 0, 0, short))

    return {key: pad(key, value) for key, value in tensors.items()}


def _norm(values: Tensor) -> Tensor:
    """Per client; its gradient at zero is zero."""
    return (values.flatten(1).square().sum(1) + 1e-24).sqrt()
