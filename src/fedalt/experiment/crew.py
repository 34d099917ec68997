"""A run's clients as its rounds see them, wherever they are: in this process, or at their sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fedalt.config import RunConfig
from fedalt.experiment.checkpoint import Checkpoint
from fedalt.methods.base import Method
from fedalt.methods.exchange import Message
from fedalt.names import Key
from fedalt.training.local import TrainingStats


@dataclass(frozen=True)
class Facts:
    """What identifies a run, what its server must know, and what its log starts with.

    Attributes:
        config: The settings.
        method: The method, for this number of clients.
        base: Fingerprint of the frozen base's weights.
        rows: Fingerprint of all rows, where they are known.
        samples: Training rows per client, for every client of the run.
        trainers: Clients that may train.
        tasks: Client → its task.
        shapes: Shape of every tensor that a client may upload.
        source: Where the rows came from.
        shared: Parameters that a client sends per round.
        trainable: Parameters that a client trains.
        partition: The content of partition.json.
        notes: What the user should know.
    """

    config: RunConfig
    method: Method
    base: str
    rows: str
    samples: Mapping[int, int]
    trainers: tuple[int, ...]
    tasks: Mapping[str, str]
    shapes: Mapping[Key, tuple[int, ...]]
    source: str
    shared: int
    trainable: int
    partition: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def clients(self) -> tuple[int, ...]:
        """Ids of all clients."""
        return tuple(self.samples)


@dataclass(frozen=True)
class Outcome:
    """What is remembered of a client's round once its tensors are in files.

    Attributes:
        client: Client id.
        stats: Loss, steps, tokens.
        delivered: Whether it uploaded anything.
        bytes_up: Size of its upload.
        bytes_down: Size of what the server told it.
        failure: Why it is set aside for this round, or nothing.
    """

    client: int
    stats: TrainingStats
    delivered: bool
    bytes_up: int
    bytes_down: int
    failure: str | None = None


class Crew(Protocol):
    """What the rounds ask of the clients. ``messages`` are what the server tells each of them, if anything."""

    def train(
        self, chosen: Sequence[int], messages: Mapping[int, Message], last: Checkpoint, new: Checkpoint
    ) -> list[Outcome]:
        """Train some clients for the round of ``new`` and put their uploads into it."""

    def row_lora_drifts(self, new: Checkpoint, messages: Mapping[int, Message]) -> Mapping[int, float | None]:
        """How far the messages move every client's row, where that is known."""

    def score(self, new: Checkpoint, messages: Mapping[int, Message]) -> float | None:
        """Score every client into the run's folder and log; the mean on validation rows, if there are any."""

    def save(self, last: Checkpoint, messages: Mapping[int, Message]) -> None:
        """Write every client's personal model."""
