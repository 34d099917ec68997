"""The rounds of one run: sample, train, aggregate, score, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedalt.config import RunConfig
from fedalt.data.batches import Plan, plan_round
from fedalt.data.encode import Example
from fedalt.errors import UserError
from fedalt.evaluation.metrics import group_mean, metrics_in, over_clients
from fedalt.experiment.checkpoint import Checkpoint, next_checkpoint, prune
from fedalt.experiment.clients import write_client
from fedalt.experiment.events import EventLog
from fedalt.experiment.folder import RunFolder
from fedalt.experiment.machine import peak_memory
from fedalt.experiment.prepare import Experiment
from fedalt.experiment.scoring import Scoring
from fedalt.federation.client import ClientResult, installed
from fedalt.federation.cohort import cohort_size, cohorts
from fedalt.federation.diagnostics import row_drift, row_gap
from fedalt.federation.executor import run_clients
from fedalt.federation.participation import sample_clients
from fedalt.federation.per_client import PerClient
from fedalt.federation.server import Server
from fedalt.files import read_json, write_json
from fedalt.methods.base import Message
from fedalt.model.state import ClientState
from fedalt.names import ROW
from fedalt.training.local import TrainingStats


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
    failure: str | None


@dataclass
class Loop:
    """One run in progress. Clients' tensors are in the checkpoint's files; one cohort's are in memory at a time.

    Attributes:
        experiment: What to run.
        folder: Where everything goes.
        log: Event log.
        server: Aggregation and its memory.
        checkpoint: The last finished round.
        run: Identifies the run in its checkpoints.
    """

    experiment: Experiment
    folder: RunFolder
    log: EventLog
    server: Server
    checkpoint: Checkpoint
    run: str

    def round(self) -> None:
        """The next round, from sampling to checkpoint."""
        started = time.perf_counter()
        with next_checkpoint(self.checkpoint) as new:
            outcomes = self._train(new)
            self._aggregate(new, outcomes)
            before, messages = self._states(new), self.server.messages(self.experiment.federation.ids)
            self._log_round(new.round, outcomes, before, messages, time.perf_counter() - started)
            if self._evaluates(new.round):
                self._evaluate(new, before, messages)
            new.write_manifest(self.run)
        self.checkpoint = new
        prune(self.folder.checkpoints, new.best)

    def finish(self) -> dict[str, Any]:
        """Write every client's folder and the final scores."""
        number, clients = self.checkpoint.round, self.experiment.federation.ids
        states, messages = self._states(self.checkpoint), self.server.messages(clients)
        if not all(self.folder.scores(client, number).is_file() for client in clients):  # resumed to fewer rounds
            self._evaluate(self.checkpoint, states, messages)
        installed = self._installed(states, messages)
        for part in cohorts(clients, cohort_size(self.experiment.config.federation, len(clients))):
            for state in self.experiment.personalised([installed[client] for client in part]):
                write_client(self.folder.client(state.client), state, self.experiment, number)
        last, best = self._final(number), self.checkpoint.best
        scores = {
            "method": self.experiment.method.name,
            "metric": self.experiment.config.metric,
            "last": last,
            "best_validation": self._final(best["round"]) if best else None,
        }
        write_json(self.folder.final_scores, scores)
        self.log.emit("run_finished", round=number, mean=last["mean"], worst=last["worst"])
        return scores

    def _train(self, new: Checkpoint) -> list[Outcome]:
        config, number = self.experiment.config, new.round
        chosen = sample_clients(self.experiment.trainers, config.federation.fraction, config.seed, number)
        self.log.emit("round_started", round=number, clients=list(chosen))
        results = run_clients(
            self.experiment.resident.model,
            chosen,
            self._states(self.checkpoint),
            self.server.messages(chosen),
            lambda client: plans_of(self.experiment, client, number),
            self.experiment.settings,
            number,
            cohort_size(config.federation, len(chosen)),
            lambda done, total: self.log.sink({"event": "step", "round": number, "done": done, "total": total}),
        )
        outcomes = [self._take(new, result) for result in results]
        if all(outcome.failure for outcome in outcomes):
            raise UserError(
                f"round {number}: every client failed ({outcomes[0].failure}); "
                f"a lower training.lr than {config.training.lr:g} may help; finished rounds are safe"
            )
        return outcomes

    def _take(self, new: Checkpoint, result: ClientResult) -> Outcome:
        client = result.state.client
        if result.failure:
            self.log.emit("client_failed", round=new.round, client=client, reason=result.failure)
        else:
            new.put(result)
        up, down = Message(result.upload).bytes, result.bytes_down
        if self.experiment.method.pooled:  # nothing crosses a network: the rows are in one place
            up = down = 0
        return Outcome(client, result.stats, bool(result.upload), up, down, result.failure)

    def _aggregate(self, new: Checkpoint, outcomes: Sequence[Outcome]) -> None:
        arrived = {outcome.client for outcome in outcomes if outcome.delivered}
        self.server.receive(arrived, new.upload, new.round)
        new.uploads, new.seen, new.memory = self.server.uploads, self.server.seen, self.server.memory
        new.keep(self.checkpoint, self.checkpoint.clients - new.clients, new.uploads.keys() - arrived)

    def _states(self, checkpoint: Checkpoint) -> PerClient[ClientState]:
        """Every client's state: from its file, or as everybody starts."""

        def state(client: int) -> ClientState:
            return checkpoint.state(client) if client in checkpoint.clients else self.experiment.initial_state(client)

        return PerClient(self.experiment.federation.ids, state)

    def _installed(self, states: Mapping[int, ClientState], messages: Mapping[int, Message]) -> PerClient[ClientState]:
        """Every client as it would start the next round: what is scored, saved and chatted with."""
        return PerClient(states, lambda client: self._install(states[client], messages))

    def _install(self, state: ClientState, messages: Mapping[int, Message]) -> ClientState:
        return installed(self.experiment.method, state, messages.get(state.client))

    def _log_round(
        self,
        number: int,
        outcomes: Sequence[Outcome],
        before: Mapping[int, ClientState],
        messages: Mapping[int, Message],
        seconds: float,
    ) -> None:
        trained = [outcome for outcome in outcomes if not outcome.failure]
        drifts = self._row_drifts(before, messages)
        for outcome in trained:
            self.log.emit(
                "client",
                round=number,
                client=outcome.client,
                loss=outcome.stats.loss,
                steps=outcome.stats.steps,
                tokens=outcome.stats.tokens,
                bytes_up=outcome.bytes_up,
                bytes_down=outcome.bytes_down,
                alpha=list(outcome.stats.alpha),
                row_drift=drifts.get(outcome.client),
            )
        self.log.emit(
            "round",
            round=number,
            seconds=seconds,
            loss=group_mean(outcome.stats.loss for outcome in trained),
            row_gap=row_gap(self.server.adapters.values()),
            row_drift=group_mean(drift for drift in drifts.values() if drift is not None),
            bytes_up=sum(outcome.bytes_up for outcome in outcomes),
            bytes_down=sum(outcome.bytes_down for outcome in outcomes),
            peak_memory=peak_memory(),
        )

    def _row_drifts(
        self, before: Mapping[int, ClientState], messages: Mapping[int, Message]
    ) -> dict[int, float | None]:
        if ROW not in self.experiment.shape.slots:
            return {}
        return {c: row_drift(state.tensors, self._install(state, messages).tensors) for c, state in before.items()}

    def _evaluates(self, number: int) -> bool:
        config = self.experiment.config
        return number % config.evaluation.every == 0 or number == config.federation.rounds

    def _evaluate(
        self, checkpoint: Checkpoint, before: Mapping[int, ClientState], messages: Mapping[int, Message]
    ) -> None:
        started = time.perf_counter()
        scoring = Scoring(self.experiment, self.folder, self.log)
        after = self._installed(before, messages)
        validation = scoring.score(checkpoint.round, before, after, changed=len(messages) > 0)
        seconds = time.perf_counter() - started
        self.log.emit("evaluated", round=checkpoint.round, seconds=seconds, peak_memory=peak_memory())
        best = checkpoint.best
        if validation is not None and (best is None or validation > best["score"]):
            checkpoint.best = {"round": checkpoint.round, "score": validation}

    def _final(self, number: int) -> dict[str, Any]:
        metric = self.experiment.config.metric
        clients = {}
        for client in self.experiment.federation.ids:
            scores = read_json(self.folder.scores(client, number))
            clients[str(client)] = metrics_in(scores)
        main = [scores[metric] for scores in clients.values()]
        return {"round": number, **over_clients(main), "clients": clients}


def plans_of(experiment: Experiment, client: int, number: int) -> list[Plan]:
    """What a client does in every phase of a round."""
    rows = experiment.training_rows(client)
    return plan_phases(rows, client, experiment.config, number, len(experiment.method.phases(number)))


def plan_phases(rows: Sequence[Example], client: int, config: RunConfig, number: int, phases: int) -> list[Plan]:
    """A plan for each of so many phases of a round."""
    return [plan_round(rows, client, config.training, config.seed, number, phase) for phase in range(phases)]
