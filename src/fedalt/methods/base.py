"""A method is a declaration and a few hooks; FedIT's behaviour (FedAvg on LoRA) is the default of every hook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from fedalt.config import LoraConfig, RunConfig
from fedalt.data.encode import Example
from fedalt.errors import UserError
from fedalt.methods.exchange import Gathered, Message
from fedalt.methods.resize import cut, padded
from fedalt.model.adapted import AdaptedModel
from fedalt.model.layer import Placement
from fedalt.model.mixing import SUM, Mixing
from fedalt.model.state import AdapterShape, ClientState
from fedalt.names import GLOBAL, A, B, Key, Tensors
from fedalt.seeding import rng
from fedalt.training.rules import PLAIN, Rule

BOTH = frozenset((A, B))
NONE: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Slot:
    """One LoRA in every adapted layer.

    Attributes:
        name: Slot name, also the name of its PEFT folder.
        share: Factors that the client uploads.
    """

    name: str
    share: frozenset[str] = BOTH


@dataclass(frozen=True)
class Phase:
    """A stretch of local training: every phase goes through the client's rows ``local_epochs`` times.

    Attributes:
        slots: LoRAs that take part in the forward pass.
        train: Slot → factors that train; the mixer trains wherever it mixes.
        mixing: How the slots are weighed.
        detached: Slots through which no gradient flows to what is below a layer.
        rule: How a step is taken.
    """

    slots: tuple[str, ...]
    train: Mapping[str, frozenset[str]]
    mixing: Mixing = SUM
    detached: tuple[str, ...] = ()
    rule: Rule = PLAIN

    def trains(self, key: Key) -> bool:
        """Whether this tensor is trained."""
        return key.factor in self.train.get(key.slot, NONE)


class Method:
    """FedAvg on LoRA unless a hook says otherwise.

    Args:
        clients: Number of clients in the federation.
        config: Settings; a method reads its own section, ``lora`` and the number of rounds.

    Attributes:
        name: Name in the registry.
        title: Name in tables.
        source: Where it was published.
        weighting: Weights of means when the settings leave them to the method.
        heterogeneous: Whether clients may have ranks of their own.
        leave_one_out: Whether a client takes itself out of the mean it is sent; the server may do it instead.
        remembers: Whether uploads of absent clients stay in the mean.
        individually: Whether the server answers from single uploads (``answers``) instead of from their mean alone.
        stateful: Whether the server remembers something from round to round (``serve``).
        foresees: Whether what a round does depends on the number of rounds.
        pooled: Whether one client trains on everybody's rows.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    weighting: ClassVar[Literal["uniform", "samples"]] = "samples"
    heterogeneous: bool = False
    leave_one_out: bool = False
    remembers: bool = False
    individually: bool = False
    stateful: ClassVar[bool] = False
    foresees: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    slots: tuple[Slot, ...] = (Slot(GLOBAL),)
    mixing: Mixing = SUM

    def __init__(self, clients: int, config: RunConfig | None = None) -> None:
        self.clients = clients
        self.config = config or RunConfig()
        self.client_ranks = self.config.lora.ranks

    # ------------------------------------------------------------------------------------------------- what there is

    def ranks(self, r: int) -> dict[str, int]:
        """Rank of every slot, for a configured rank r; the largest of any client where ranks are unequal."""
        return dict.fromkeys(self.slot_names, self.widest(r))

    def widest(self, r: int) -> int:
        """The largest rank of any client."""
        return max(self.client_ranks or (r,))

    def shape(self, r: int, layers: Mapping[str, tuple[int, int]]) -> AdapterShape:
        """The tensors of one client."""
        return AdapterShape(self.ranks(r), self.mixing.kind == "softmax", layers)

    def scale(self, lora: LoraConfig) -> float:
        """s, on every slot."""
        return lora.alpha / lora.r

    def rank_of(self, client: int) -> int | None:
        """The client's own rank, or nothing where all have the slots'.

        Raises:
            UserError: Ranks are set and this method has no rule for unequal ones.
        """
        if self.client_ranks is None:
            return None
        if not self.heterogeneous:
            raise UserError(f"lora.ranks: {self.name} has no rule for clients of different ranks; leave it out")
        return self.client_ranks[client % len(self.client_ranks)]

    @property
    def frozen(self) -> tuple[str, ...]:
        """Slots that start at zero, because the server fills them."""
        return ()

    # -------------------------------------------------------------------------------------------- what a client does

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """What a client trains in a round, one after the other."""
        return (Phase(self.slot_names, {slot.name: BOTH for slot in self.slots}, self.mixing),)

    def fraction(self, round_: int) -> float:
        """Share of the clients that take part in a round."""
        return self.config.federation.fraction

    @property
    def all_phases(self) -> list[Phase]:
        """Phases of the first, the second and the last round; no other round has another."""
        return [phase for round_ in (1, 2, self.config.federation.rounds) for phase in self.phases(round_)]

    def trains(self, key: Key) -> bool:
        """Whether a client ever trains this tensor."""
        return any(phase.trains(key) for phase in self.all_phases)

    @property
    def slot_names(self) -> tuple[str, ...]:
        """Names of all slots."""
        return tuple(slot.name for slot in self.slots)

    def before(self, state: ClientState, round_: int) -> ClientState:
        """What a client does between installing and training."""
        return state

    def after(self, state: ClientState, began: ClientState, round_: int) -> ClientState:
        """What a client does between training, which began at some state, and uploading."""
        return state

    def shares(self, key: Key) -> bool:
        """Whether this tensor may leave the client."""
        return any(key.slot == slot.name and key.factor in slot.share for slot in self.slots)

    def upload(self, state: ClientState) -> Tensors:
        """What the client sends after training: its shared factors, of its own rank."""
        shared = {key: value for key, value in state.tensors.items() if self.shares(key)}
        rank = self.rank_of(state.client)
        return shared if rank is None else cut(shared, rank)

    def sent(self, state: ClientState) -> ClientState:
        """Remember the upload exactly as the server received it."""
        return replace(state, sent=self.upload(state) or None)

    def install(self, state: ClientState, message: Message) -> ClientState:
        """What the client does with the server's answer: overwrite the shared factors."""
        return state.with_tensors(padded(message.tensors, state.tensors))

    def left_out(self, key: Key) -> bool:
        """Whether a client's own part is taken out of this tensor's mean, where ``leave_one_out`` holds."""
        return True

    # ------------------------------------------------------------------------------------ what somebody new starts with

    @property
    def arrival(self) -> tuple[tuple[str, ...], Mixing]:
        """Slots that answer for a client that has trained nothing, with the server's answer installed, and how."""
        shared = tuple(slot.name for slot in self.slots if slot.share)
        return (shared, SUM) if shared and shared != self.slot_names else self.inference

    @property
    def arrival_phases(self) -> tuple[Phase, ...]:
        """What a client that joins a finished run trains, once; it sends nothing."""
        return self.phases(2)

    # -------------------------------------------------------------------------------------------- what the server does

    def serve(self, gathered: Gathered) -> Tensors:
        """What a ``stateful`` method remembers after a round."""
        return {}

    def answers(self, gathered: Gathered) -> Callable[[int, int], Message]:
        """What a method that answers ``individually`` or from memory tells (client, its last round)."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------------------------- what answers

    @property
    def inference(self) -> tuple[tuple[str, ...], Mixing]:
        """Slots that answer, and how they are weighed."""
        return self.slot_names, self.mixing

    def personalise(
        self,
        model: AdaptedModel,
        states: Sequence[ClientState],
        rows: Mapping[int, Sequence[Example]],
        placement: Placement,
    ) -> list[ClientState]:
        """Make the models that answer from what clients keep.

        Args:
            model: The model, to be used freely.
            states: A cohort's states, as they would start the next round.
            rows: Client → its training rows.
            placement: How adapters sit on the model for answering.
        """
        return list(states)


def drawn(rows: Sequence[Example], count: int, seed: int, *purpose: str | int) -> list[Example]:
    """Some of a client's rows, from the seed and the purpose alone."""
    order = torch.randperm(len(rows), generator=rng(seed, *purpose)).tolist()
    return [rows[i] for i in order[:count]]


def copied(state: ClientState, source: str, to: str) -> ClientState:
    """The state with one slot's factors in another's place, too."""
    return state.with_tensors({k._replace(slot=to): v.clone() for k, v in state.tensors.items() if k.slot == source})
