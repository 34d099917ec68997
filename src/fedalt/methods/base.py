"""A method is a declaration and a few hooks; FedIT's behaviour (FedAvg on LoRA) is the default of every hook.

What acts in a round, in this order; hooks that a method may override are on the left:

    server   client_messages     what each client is told; a mean of uploads unless the method needs single ones
    client   receive             the message goes into the client's state
             before_training     anything else that comes first
             phases              which LoRAs take part, which train, how they are weighed; one stretch after the other
               penalty             + penalty(trained, start) in every client's loss
             after_training      anything that follows
             upload              what leaves the client; ``shares`` says which tensors may
             uploaded            the client notes what the server has received from it
    server   server_update       what the server remembers, if the method ``has_server_state``

    to answer: receive, then personalise, then ``inference`` says which LoRAs answer and how they are weighed
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor

from fedalt.compat import slot_today
from fedalt.config import FederationConfig, RunConfig
from fedalt.config.hints import explain
from fedalt.config.section import Section
from fedalt.data.encode import Example
from fedalt.errors import UserError
from fedalt.methods.algebra import Factors, cut, padded
from fedalt.model.adapted import AdaptedModel
from fedalt.model.layer import SUM, Mixing, Placement
from fedalt.model.state import AdapterShape, ClientState
from fedalt.names import GLOBAL, A, B, Key, Tensors
from fedalt.seeding import rng
from fedalt.training.optimizer import PLAIN, Plain, Rule

_MOST_ROUNDS = 1000

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

    def __post_init__(self) -> None:
        if slot_today(self.name) != self.name or "." in self.name:
            raise UserError(f'slot "{self.name}": not free; in fedalt 0.1 it named the rest-of-world LoRA')


@dataclass(frozen=True)
class Phase:
    """A stretch of local training: every phase goes through the client's rows ``local_epochs`` times.

    Attributes:
        slots: LoRAs that take part in the forward pass.
        train: Slot → factors that train; the mixer trains wherever it mixes.
        mixing: How the slots are weighed.
        detached: Slots through which no gradient flows to what is below a layer.
        rule: How a step is taken.
        slot_dropout: Probability that a client's step has one of the slots alone, where a mixer weighs them.
        held_out: Whether it goes through a client's held-out rows instead.
    """

    slots: tuple[str, ...]
    train: Mapping[str, frozenset[str]]
    mixing: Mixing = SUM
    detached: tuple[str, ...] = ()
    rule: Rule = PLAIN
    slot_dropout: float = 0.0
    held_out: bool = False

    def trains(self, key: Key) -> bool:
        """Whether this tensor is trained."""
        return key.factor in self.train.get(key.slot, NONE)


class Method:
    """FedAvg on LoRA unless a hook says otherwise. See the order of hooks at the head of this file.

    >>> import fedalt as fa
    >>> @fa.method("only_a")
    ... class OnlyA(fa.Method):
    ...     def shares(self, key):
    ...         return super().shares(key) and key.factor == "A"
    >>> data = fa.load_data("tinyworld", clients=2, train_limit=4, test_limit=2)
    >>> for r in fa.Simulation(data, "tiny-base", OnlyA, epochs=1).rounds(1):
    ...     {key.factor for key in r.uploads[0]}
    {'A'}

    A method is made with its settings, ``FedProx(mu=0.1)``, and bound to a run: its clients, layers and other settings.

    Attributes:
        Settings: Its section of the YAML; a nested class with fields.
        name: Name in the registry.
        title: Name in tables; the name when not given.
        source: Where it was published.
        section: Name of its section; the registered name when not given.
        weighting: Weights of means when the settings leave them to the method.
        heterogeneous: Whether clients may have ranks of their own.
        leave_one_out: Whether a client takes itself out of the mean it is sent; the server may do it instead.
        keeps_absent: Whether uploads of absent clients stay in the mean.
        needs_uploads: Whether the server answers from single uploads (``client_messages``), not from their mean alone.
        has_server_state: Whether the server remembers something from round to round (``server_update``).
        depends_on_rounds: Whether what a round does depends on the number of rounds.
        centralised: Whether one client trains on everybody's rows.
        held_out: Share of its training rows that a client without validation rows keeps for choices; such rows are
            validation rows then, no phase trains on them unless it says so, and ``personalise`` gets them.
        slots: The LoRAs of every adapted layer.
        mixing: How they are weighed.
        clients: Number of clients in the federation, once bound.
        layers: Path of every adapted layer → (d_in, d_out); empty where settings alone are checked.
        config: All settings of the run.
        settings: The method's own.
    """

    Settings: ClassVar[type[Section]] = Section
    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    source: ClassVar[str] = ""
    section: ClassVar[str] = ""
    weighting: ClassVar[Literal["uniform", "samples"]] = "samples"
    heterogeneous: bool = False
    leave_one_out: bool = False
    keeps_absent: bool = False
    needs_uploads: bool = False
    has_server_state: ClassVar[bool] = False
    depends_on_rounds: ClassVar[bool] = False
    centralised: ClassVar[bool] = False
    held_out: float = 0.0
    slots: tuple[Slot, ...] = (Slot(GLOBAL),)
    mixing: Mixing = SUM

    clients: int
    layers: Mapping[str, tuple[int, int]]
    config: RunConfig
    settings: Any
    client_ranks: tuple[int, ...] | None = None

    def __init__(self, settings: Section | None = None, **values: Any) -> None:
        if settings is not None:
            self.settings = settings
            return
        try:
            self.settings = self.Settings(**values)
        except ValidationError as error:
            lines = (explain(one, self.Settings, type(self).__name__) for one in error.errors())
            raise UserError("\n".join(dict.fromkeys(lines))) from None

    def bind(self, clients: int, config: RunConfig, layers: Mapping[str, tuple[int, int]] | None = None) -> Self:
        """This method as a run takes it."""
        bound = copy(self)
        bound.clients, bound.config, bound.layers = clients, config, layers or {}
        bound.client_ranks = config.lora.ranks
        bound.setup()
        bound._check_secure()
        bound._check_private()
        if config.evaluation.early_stop and bound.depends_on_rounds:
            raise UserError(
                f"evaluation.early_stop: {bound.name} plans by the number of rounds, so none can be left out"
            )
        return bound

    def _check_secure(self) -> None:
        """Refuse a secure sum where one upload must be seen."""
        config = self.config.federation
        if not config.secure:
            return
        why = {
            f"{self.name} makes its answer of single uploads": self.needs_uploads or self.has_server_state,
            "lora.ranks gives clients ranks of their own": self.client_ranks is not None,
            "federation.rest_of_world_delivery=unicast makes every client an answer of its own": (
                config.rest_of_world_delivery == "unicast"
            ),
            "federation.rest_of_world_participation=staleness_decay weighs uploads of earlier rounds": (
                config.rest_of_world_participation == "staleness_decay"
            ),
        }
        if wrong := next((line for line, holds in why.items() if holds), None):
            raise UserError(f"federation.secure: {wrong}, and the server sees only a sum")

    def _check_private(self) -> None:
        """Refuse private steps where a row's part in them would not be bounded, or not be all of it."""
        if not self.config.privacy.on:
            return
        phases = self.all_phases
        why = {
            f"{self.name} trains on everybody's rows in one place": self.centralised,
            f"{self.name} trains nothing": not phases,
            f"{self.name} takes steps of its own kind": any(not isinstance(phase.rule, Plain) for phase in phases),
            f"{self.name} trains on held-out rows, too": any(phase.held_out for phase in phases),
            "lora.ranks has factors that stay at zero, and noise would not": self.client_ranks is not None,
        }
        if wrong := next((line for line, holds in why.items() if holds), None):
            raise UserError(f"privacy: {wrong}, which is not covered; use another method, or leave privacy out")

    @property
    def private_phases(self) -> int:
        """Times that a client goes through its rows, ``local_epochs`` times each, in all rounds."""
        return sum(len(self.phases(number)) for number in range(1, self.config.federation.rounds + 1))

    def setup(self) -> None:
        """Derive what follows from the settings, and refuse those that do not fit; called once, when bound."""

    def remarks(self) -> Sequence[str]:
        """Notes on a run as it is set, when it starts; what cannot work with so many clients is refused here."""
        return ()

    # ------------------------------------------------------------------------------------------------- what there is

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every slot; the largest of any client where ranks are unequal."""
        return dict.fromkeys(self.slot_names, self.widest)

    @property
    def widest(self) -> int:
        """The largest rank of any client."""
        return max(self.client_ranks or (self.config.lora.r,))

    @property
    def shape(self) -> AdapterShape:
        """The tensors of one client."""
        return AdapterShape(self.ranks, self.mixing.kind == "softmax", self.layers)

    @property
    def scale(self) -> float:
        """s, on every slot."""
        return self.config.lora.scale(self.config.lora.r)

    def rank_of(self, client: int) -> int | None:
        """The client's own rank, or None where all have the slots'."""
        if self.client_ranks is None:
            return None
        if not self.heterogeneous:
            raise UserError(f"lora.ranks: {self.name} has no rule for clients of different ranks; leave it out")
        return self.client_ranks[client % len(self.client_ranks)]

    def weighs_by(self, config: FederationConfig) -> str:
        """What the weights of means are: ``uniform``, or ``samples``."""
        return self.weighting if config.weighting == "method" else config.weighting

    @property
    def frozen(self) -> tuple[str, ...]:
        """Slots that start at zero, because the server fills them."""
        return ()

    # -------------------------------------------------------------------------------------------- what a client does

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """What a client trains in a round, one after the other."""
        return (Phase(self.slot_names, {slot.name: BOTH for slot in self.slots}, self.mixing),)

    @property
    def plans_by_rounds(self) -> bool:
        """Whether a run's rounds differ with their number: by the method, or by a schedule over all of them."""
        privacy = self.config.privacy
        solved = privacy.on and privacy.noise_multiplier is None
        return self.depends_on_rounds or self.config.training.schedule_scope == "run" or solved

    def fraction(self, round_: int) -> float:
        """Share of the clients that take part in a round."""
        return self.config.federation.fraction

    @property
    def all_phases(self) -> list[Phase]:
        """Phases of all rounds; of the first thousand and the last where there are more."""
        rounds = self.config.federation.rounds
        some = range(1, rounds + 1) if rounds <= _MOST_ROUNDS else (*range(1, _MOST_ROUNDS), rounds)
        return [phase for round_ in some for phase in self.phases(round_)]

    def trains(self, key: Key) -> bool:
        """Whether a client ever trains this tensor."""
        return any(phase.trains(key) for phase in self.all_phases)

    @property
    def slot_names(self) -> tuple[str, ...]:
        """Names of all slots."""
        return tuple(slot.name for slot in self.slots)

    def before_training(self, state: ClientState, round_: int) -> ClientState:
        """What a client does between receiving and training."""
        return state

    def penalty(self, trained: Tensors, start: Tensors) -> Float[Tensor, " k"] | None:
        """What is added to each client's loss at every step, from what a phase trains; None for nothing.

        Args:
            trained: The tensors that train, ``[k, …]`` for k clients side by side; gradients flow through them. Heads
                are among them where they are shared: a private one has nothing that it could be held to.
            start: The same as the client's round began, after ``before_training``. Frozen LoRAs of the state are in it,
                too, so that a penalty may hold one slot against another.
        """
        return None

    def after_training(self, state: ClientState, began: ClientState, round_: int) -> ClientState:
        """What a client does between training, which began at some state, and uploading; all its numbers are finite."""
        return state

    def shares(self, key: Key) -> bool:
        """Whether this tensor may leave the client."""
        return any(key.slot == slot.name and key.factor in slot.share for slot in self.slots)

    def upload(self, state: ClientState) -> Tensors:
        """What the client sends after training: its shared factors, of its own rank."""
        shared = {key: value for key, value in state.tensors.items() if self.shares(key)}
        rank = self.rank_of(state.client)
        return shared if rank is None else cut(shared, rank)

    def uploaded(self, state: ClientState) -> ClientState:
        """Remember the upload exactly as the server received it."""
        return replace(state, sent=self.upload(state) or None)

    def receive(self, state: ClientState, message: Message) -> ClientState:
        """What the client does with the server's answer: overwrite the shared factors."""
        return state.with_tensors(padded(message.tensors, state.tensors))

    def left_out(self, key: Key) -> bool:
        """Whether a client's own part is taken out of this tensor's mean, where ``leave_one_out`` holds."""
        return True

    # ------------------------------------------------------------------------------------ what somebody new starts with

    @property
    def newcomer(self) -> tuple[tuple[str, ...], Mixing]:
        """Slots that answer for a client that has trained nothing, with the server's answer installed, and how."""
        shared = tuple(slot.name for slot in self.slots if slot.share)
        return (shared, SUM) if shared and shared != self.slot_names else self.inference

    @property
    def newcomer_phases(self) -> tuple[Phase, ...]:
        """What a client that joins a finished run trains, once; it sends nothing."""
        return self.phases(2)

    # -------------------------------------------------------------------------------------------- what the server does

    def server_update(self, gathered: Gathered) -> Tensors:
        """What a method that ``has_server_state`` remembers after a round."""
        return {}

    def client_messages(self, gathered: Gathered) -> Callable[[int, int], Message]:
        """From a client and its last round to its message; for methods with ``needs_uploads`` or server state."""
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
            rows: Client → its training rows; its validation rows where the method has rows ``held_out``.
            placement: How adapters sit on the model for answering.
        """
        return list(states)


def drawn(rows: Sequence[Example], count: int, seed: int, *purpose: str | int) -> list[Example]:
    """Some of a client's rows, from the seed and the purpose alone."""
    order = torch.randperm(len(rows), generator=rng(seed, *purpose)).tolist()
    return [rows[i] for i in order[:count]]


def squared_distance(trained: Tensors, start: Tensors) -> Float[Tensor, " k"]:
    """‖w − w₀‖² of each client, over all tensors that train.

    >>> import fedalt as fa, torch
    >>> fa.squared_distance({"A": torch.ones(2, 3, 4)}, {"A": torch.zeros(2, 3, 4)})
    tensor([12., 12.])

    Args:
        trained: Tensors ``[k, …]`` of k clients.
        start: The same keys, and perhaps others.
    """
    parts = [(value - start[key]).flatten(1).square().sum(1) for key, value in trained.items()]
    return torch.stack(parts).sum(0)


def copied(state: ClientState, source: str, to: str) -> ClientState:
    """The state with one slot's factors in another's place, too."""
    return state.with_tensors({k._replace(slot=to): v.clone() for k, v in state.tensors.items() if k.slot == source})


def trainable(method: Method, shape: AdapterShape | None = None) -> int:
    """Most parameters that a client trains at once, in any phase of any round."""
    shape = shape or method.shape
    sizes = (shape.size([key for key in shape.shapes() if phase.trains(key)]) for phase in method.all_phases)
    return max(sizes, default=0)


def sent(method: Method, shape: AdapterShape) -> int:
    """Parameters that a client of the largest rank uploads per round."""
    return shape.size([key for key in shape.shapes() if method.shares(key)])


@dataclass(frozen=True)
class Message:
    """What the server tells one client at the start of a round.

    Attributes:
        tensors: A mean of uploads, or whatever the method makes of them.
        share: This client's weight p in that mean, 0 when it is not in it (late, failed, or left out on purpose).
    """

    tensors: Tensors
    share: float = 0.0

    @property
    def bytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


@dataclass(frozen=True)
class Gathered:
    """What the server has to make an answer of.

    Attributes:
        uploads: Client → its latest upload that counts.
        weights: Client → its unnormalised weight.
        memory: What the method remembers from round to round.
        round: The round whose uploads came last.
    """

    uploads: Mapping[int, Tensors]
    weights: Mapping[int, float]
    memory: Tensors
    round: int

    def shares(self, without: int | None = None) -> dict[int, float]:
        """Normalised weights, perhaps of everybody but one client."""
        others = {client: weight for client, weight in self.weights.items() if client != without}
        total = sum(others.values())
        return {client: weight / total for client, weight in others.items()}

    def factors(self, slot: str) -> dict[str, dict[int, Factors]]:
        """Module → client → (A, B) of a slot; every upload is read once."""
        uploads = {client: self.uploads[client] for client in self.weights}
        modules = dict.fromkeys(key.module for key in next(iter(uploads.values())))
        return {m: {c: (t[Key(m, slot, A)], t[Key(m, slot, B)]) for c, t in uploads.items()} for m in modules}
