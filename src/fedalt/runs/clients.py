"""A run's clients as its rounds see them, and those of this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Protocol

from fedalt.config import RunConfig
from fedalt.data.batches import Noise, Plan, plan_round
from fedalt.data.encode import Example
from fedalt.federation.client import ClientResult, cohort_size, cohorts, installed, run_clients
from fedalt.federation.diagnostics import row_lora_drift
from fedalt.federation.server import PerClient
from fedalt.methods.base import Message, Phase
from fedalt.model.state import ClientState
from fedalt.names import REST_OF_WORLD
from fedalt.runs.checkpoint import Checkpoint
from fedalt.runs.client_folder import save_client
from fedalt.runs.events import EventLog
from fedalt.runs.folder import RunFolder
from fedalt.runs.scoring import Points, log_points, score_clients
from fedalt.runs.setup import Experiment
from fedalt.training.loop import TrainingStats


@dataclass(frozen=True)
class ClientReport:
    """What is remembered of a client's round once its tensors are in files.

    Attributes:
        cut: Numbers of its upload that a secure sum has no room for.
    """

    client: int
    stats: TrainingStats
    delivered: bool
    bytes_up: int
    bytes_down: int
    failure: str | None = None
    cut: int = 0


class ClientBackend(Protocol):
    """What the rounds ask of the clients. ``messages`` are what the server tells each of them, if anything."""

    def train(
        self, chosen: Sequence[int], messages: Mapping[int, Message], last: Checkpoint, new: Checkpoint
    ) -> list[ClientReport]:
        """Train some clients for the round of ``new`` and put their uploads into it."""

    def row_lora_drifts(self, new: Checkpoint, messages: Mapping[int, Message]) -> Mapping[int, float | None]:
        """How far the messages move every client's row, where that is known."""

    def score(self, new: Checkpoint, messages: Mapping[int, Message]) -> float | None:
        """Score every client into the run's folder and log; the mean on validation rows, if there are any."""

    def save(self, checkpoint: Checkpoint, messages: Mapping[int, Message]) -> None:
        """Write every client's personal model: of the last round, and after it of the best one, if that is another."""

    @property
    def keeps_best(self) -> bool:
        """Whether the best round's states are still there at the end."""


@dataclass(frozen=True)
class LocalClients:
    """The clients of a run on one machine. One cohort's tensors are in memory at a time."""

    experiment: Experiment
    folder: RunFolder
    log: EventLog
    keeps_best: ClassVar[bool] = True
    _made: dict[tuple[int, int], ClientState] = field(default_factory=dict)

    def train(
        self, chosen: Sequence[int], messages: Mapping[int, Message], last: Checkpoint, new: Checkpoint
    ) -> list[ClientReport]:
        """Train cohort by cohort."""
        outcomes = self.trained(chosen, messages, last, new)
        new.keep(last, states=last.clients - new.clients)
        return outcomes

    def trained(
        self, chosen: Sequence[int], messages: Mapping[int, Message], last: Checkpoint, new: Checkpoint
    ) -> list[ClientReport]:
        """Train and put into ``new`` what comes of it, and nothing of who rests."""
        experiment, number = self.experiment.in_folder(self.folder), new.round
        results = run_clients(
            experiment.resident.model,
            chosen,
            states_in(last, experiment),
            messages,
            lambda client: plans_of(experiment, client, number),
            settings=experiment.settings,
            round_=number,
            cohort=cohort_size(experiment.config.federation, len(chosen)),
            install=lambda state, message: self._start(last.round, state.client, lambda: state, message),
            on_step=lambda done, total: self.log.sink({"event": "step", "round": number, "done": done, "total": total}),
        )
        return [self._take(new, result) for result in results]

    def _take(self, new: Checkpoint, result: ClientResult) -> ClientReport:
        client = result.state.client
        if not result.failure:
            new.put_state(result.state)
            new.put_upload(client, result.upload)
        up, down = Message(result.upload).bytes, result.bytes_down
        if self.experiment.method.centralised:  # nothing crosses a network: the rows are in one place
            up = down = 0
        return ClientReport(client, result.stats, bool(result.upload), up, down, result.failure, result.cut)

    def row_lora_drifts(self, new: Checkpoint, messages: Mapping[int, Message]) -> dict[int, float | None]:
        """How far the messages move every client's row."""
        if REST_OF_WORLD not in self.experiment.shape.slots:
            return {}
        drifts = {}
        for client, state in states_in(new, self.experiment).items():
            after = self._start(new.round, client, partial(replace, state), messages.get(client))
            drifts[client] = row_lora_drift(state.tensors, after.tensors)
        return drifts

    def score(self, new: Checkpoint, messages: Mapping[int, Message]) -> float | None:
        """Score everybody as they left training and as they would start the next round."""
        points = self.scored(self.experiment.federation.ids, new, messages)
        return log_points(self.log, new.round, points, self.experiment.config.metric)

    def scored(self, clients: Sequence[int], new: Checkpoint, messages: Mapping[int, Message]) -> Points:
        """Scores of some, which are in the run's folder then, but not in its log."""
        before = states_in(new, self.experiment)
        after = PerClient(clients, self._starts(new, messages).__getitem__)
        changed = len(messages) > 0
        return score_clients(self.experiment, self.folder, new.round, before, after, changed=changed)

    def save(self, checkpoint: Checkpoint, messages: Mapping[int, Message]) -> None:
        """Write every client's folder."""
        states = self._starts(checkpoint, messages)
        clients = self.experiment.federation.ids
        for part in cohorts(clients, cohort_size(self.experiment.config.federation, len(clients))):
            for state in self.experiment.personalised([states[client] for client in part]):
                save_client(self.folder, state, self.experiment, checkpoint.round)

    def _starts(self, last: Checkpoint, messages: Mapping[int, Message]) -> PerClient[ClientState]:
        """Every client as it starts the next round: what is scored, saved, chatted with, and trained on."""
        states = states_in(last, self.experiment)
        return PerClient(
            states, lambda client: self._start(last.round, client, lambda: states[client], messages.get(client))
        )

    def _start(self, round_: int, client: int, read: Callable[[], ClientState], message: Message | None) -> ClientState:
        """A message is put into a state once, as long as no more clients than a cohort has come between."""
        known = self._made.get((round_, client))
        if known is None:
            clients = len(self.experiment.federation.ids)
            while len(self._made) >= cohort_size(self.experiment.config.federation, clients):
                del self._made[next(iter(self._made))]
            known = installed(self.experiment.method, read(), message)
            self._made[round_, client] = known
        return known


def states_in(checkpoint: Checkpoint, experiment: Experiment) -> PerClient[ClientState]:
    """Every client's state: from its file, or as everybody starts."""

    def state(client: int) -> ClientState:
        return checkpoint.state(client) if client in checkpoint.clients else experiment.initial_state(client)

    return PerClient(experiment.federation.ids, state)


def plans_of(experiment: Experiment, client: int, number: int) -> list[Plan]:
    """What a client does in every phase of a round."""
    rows, phases = experiment.training_rows(client), experiment.method.phases(number)
    held, noise = experiment.examples[client].validation, experiment.noise(client)
    return plan_phases(phases, rows, client, experiment.config, number, held=held, noise=noise)


def plan_phases(
    phases: Sequence[Phase],
    rows: Sequence[Example],
    client: int,
    config: RunConfig,
    number: int,
    *,
    held: Sequence[Example],
    noise: Noise | None = None,
) -> list[Plan]:
    """A plan for each phase of a round, on training rows or, where it says so and there are any, on held-out ones."""
    return [
        plan_round(
            held if phase.held_out and held else rows,
            client,
            config.training,
            config.seed,
            number,
            phase=place,
            noise=noise,
        )
        for place, phase in enumerate(phases)
    ]
