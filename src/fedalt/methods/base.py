"""A method is a declaration and a few hooks; FedIT's behaviour (FedAvg on LoRA) is the default of every hook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fedalt.model.state import AdapterShape, ClientState
from fedalt.names import GLOBAL, MIXER, A, B, Key, Tensors


@dataclass(frozen=True)
class Slot:
    """One LoRA in every adapted layer.

    Attributes:
        name: Slot name, also the name of its PEFT folder.
        train: Factors that the client trains.
        share: Factors that the client uploads.
    """

    name: str
    train: frozenset[str] = frozenset((A, B))
    share: frozenset[str] = frozenset((A, B))


@dataclass(frozen=True)
class Message:
    """What the server tells one client at the start of a round.

    Attributes:
        tensors: A mean of uploads.
        share: This client's weight p in that mean, 0 when it is not in it (late, failed, or left out on purpose).
    """

    tensors: Tensors
    share: float


class Method:
    """FedAvg on LoRA unless a hook says otherwise.

    Args:
        clients: Number of clients in the federation.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    weighting: ClassVar[Literal["uniform", "samples"]] = "samples"
    slots: tuple[Slot, ...] = (Slot(GLOBAL),)
    mixed: bool = False
    leave_one_out: ClassVar[bool] = False
    """Whether the server may send every client the mean of the others, and remembers uploads of absent clients."""

    def __init__(self, clients: int) -> None:
        self.clients = clients

    def shape(self, r: int, layers: Mapping[str, tuple[int, int]]) -> AdapterShape:
        """The tensors of one client."""
        return AdapterShape(tuple(slot.name for slot in self.slots), self.mixed, r, layers)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Slots that nobody trains."""
        return tuple(slot.name for slot in self.slots if not slot.train)

    def trains(self, key: Key) -> bool:
        """Whether the client trains this tensor."""
        return key.slot == MIXER or any(key.slot == slot.name and key.factor in slot.train for slot in self.slots)

    def shares(self, key: Key) -> bool:
        """Whether this tensor may leave the client. The mixer never does."""
        return any(key.slot == slot.name and key.factor in slot.share for slot in self.slots)

    def upload(self, state: ClientState) -> Tensors:
        """What the client sends after training: its shared factors."""
        return {key: value for key, value in state.tensors.items() if self.shares(key)}

    def install(self, state: ClientState, message: Message) -> ClientState:
        """What the client does with the server's mean: overwrite the shared factors."""
        return state.with_tensors(message.tensors)

    def sent(self, state: ClientState) -> ClientState:
        """Remember the upload exactly as the server received it."""
        return replace(state, sent=self.upload(state) or None)
