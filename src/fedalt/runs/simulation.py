"""The rounds of a run by hand: everything in memory, nothing in files, the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from fedalt.config import RunConfig
from fedalt.data.load import Rows
from fedalt.errors import UserError
from fedalt.evaluation.metrics import metrics_in
from fedalt.federation.client import cohort_size, cohorts, installed, run_clients
from fedalt.federation.server import Server, sample_clients
from fedalt.methods.base import Message
from fedalt.methods.registry import configured
from fedalt.model.state import ClientState
from fedalt.names import Tensors
from fedalt.runs.clients import plans_of
from fedalt.runs.rounds import check_some_left
from fedalt.runs.scoring import Scores, scored_on
from fedalt.runs.setup import Bases, Experiment, load_rows, prepare


@dataclass(frozen=True)
class Round:
    """A finished round.

    Attributes:
        number: Counted from 1.
        losses: Client → mean training loss per answer token, in nats, of those who took part and did not fail.
        uploads: Client → what it sent: key → tensor, in fp32. Empty for a method that sends nothing.
        states: Every client's state as it left training, before it has received anything that this round made.
        failures: Client → why it was set aside.
        server: The server after this round.
    """

    number: int
    losses: dict[int, float]
    uploads: dict[int, Tensors]
    states: dict[int, ClientState]
    failures: dict[int, str]
    server: Server

    @cached_property
    def messages(self) -> Mapping[int, Message]:
        """Client → what the server tells it after this round; each is made when it is looked at."""
        return self.server.messages(tuple(self.states))


class Rounds:
    """A run in memory that is taken round by round. All clients' adapters are held at a time."""

    def __init__(self, config: RunConfig, bases: Bases, rows: Rows) -> None:
        config = configured(config, config.method)
        if config.evaluation.early_stop:
            raise UserError("evaluation.early_stop: rounds by hand are not scored by themselves; stop asking for them")
        config, self._federation = load_rows(config, rows)
        self._config, self._bases, self._rows = config, bases, rows
        self._uploads: dict[int, Tensors] = {}
        self.number = 0
        self.experiment = self._prepared(config.federation.rounds)
        self.states = {client: self.experiment.initial_state(client) for client in self.experiment.federation.ids}
        samples = {client: len(mine.train) for client, mine in self.experiment.examples.items()}
        federation, shapes = self.experiment.config.federation, self.experiment.upload_shapes
        self.server = Server(self.experiment.method, federation, samples, shapes)

    def rounds(self, count: int | None = None) -> Iterator[Round]:
        """The next rounds, one at a time, as they are asked for.

        Args:
            count: How many; those that the settings ask for and that are left when not given.
        """
        asked = self.experiment.config.federation.rounds
        total = asked if count is None else self.number + count
        if total != asked:
            if self.number and self.experiment.method.plans_by_rounds:
                raise UserError(
                    f"{self._by_rounds} plans by the number of rounds, {asked} here; begin anew for another"
                )
            self.experiment = self._prepared(total)
            self.server.method = self.experiment.method
        while self.number < total:
            yield self._round(self.number + 1)

    def score(self) -> Scores:
        """Score every client on its own test rows, as it would start the next round."""
        experiment, clients = self.experiment, self.experiment.federation.ids
        messages = self.server.messages(clients)
        details: dict[int, dict[str, float]] = {}
        for part in cohorts(clients, cohort_size(experiment.config.federation, len(clients))):
            states = [installed(experiment.method, self.states[client], messages.get(client)) for client in part]
            for evaluation in scored_on(experiment, experiment.personalised(states), "test"):
                details[evaluation.client] = metrics_in(evaluation.scores)
        return Scores.of(experiment.config.metric, self.number, details)

    @property
    def _by_rounds(self) -> str:
        method = self.experiment.method
        return method.name if method.depends_on_rounds else "training.schedule_scope=run"

    def _prepared(self, rounds: int) -> Experiment:
        config = self._config.having("federation", rounds=rounds)
        experiment = prepare(config, self._bases.of(config), self._federation, rows=self._rows)
        return experiment.with_cohort(config.federation.cohort or experiment.fitting_cohort)

    def _round(self, number: int) -> Round:
        experiment = self.experiment
        config, method = experiment.config, experiment.method
        chosen = sample_clients(experiment.trainers, method.fraction(number), config.seed, number)
        trained = run_clients(
            experiment.resident.model,
            chosen,
            self.states,
            self.server.messages(chosen),
            lambda client: plans_of(experiment, client, number),
            settings=experiment.settings,
            round_=number,
            cohort=cohort_size(config.federation, len(chosen)),
        )
        results = {result.state.client: result for result in trained}
        failures = {client: result.failure for client, result in results.items() if result.failure}
        check_some_left([result.failure for result in results.values()], number, config.training.lr)
        self.states = self.states | {client: result.state for client, result in results.items()}
        uploads = {client: result.upload for client, result in results.items() if result.upload}
        self._uploads = {**self._uploads, **uploads}
        self.server = copy.copy(self.server)  # a round keeps the one that it had
        self.server.receive(uploads, self._uploads.__getitem__, number)
        self.number = number
        losses = {client: result.stats.loss for client, result in results.items() if not result.failure}
        return Round(number, losses, dict(uploads), dict(self.states), failures, self.server)
