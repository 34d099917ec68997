"""The rounds of one run: sample, train, aggregate, score, checkpoint. Where its clients are is their crew's matter."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedalt.errors import UserError
from fedalt.evaluation.metrics import group_mean, metric_of, metrics_in, over_clients
from fedalt.experiment.checkpoint import Checkpoint, next_checkpoint, prune
from fedalt.experiment.crew import Crew, Facts, Outcome
from fedalt.experiment.events import EventLog
from fedalt.experiment.folder import RunFolder
from fedalt.experiment.machine import peak_memory
from fedalt.federation.diagnostics import product_gap
from fedalt.federation.participation import sample_clients
from fedalt.federation.server import Server
from fedalt.files import read_json, write_json
from fedalt.methods.exchange import Message


@dataclass
class Loop:
    """One run in progress. Uploads are in the checkpoint's files.

    Attributes:
        facts: What is run.
        crew: Its clients.
        folder: Where everything goes.
        log: Event log.
        server: Aggregation and its memory.
        checkpoint: The last finished round.
        run: Identifies the run in its checkpoints.
    """

    facts: Facts
    crew: Crew
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
            messages = self.server.messages(self.facts.clients)
            drifts = self.crew.row_lora_drifts(new, messages)
            self._log_round(new.round, outcomes, drifts, time.perf_counter() - started)
            if self._evaluates(new.round):
                self._evaluate(new, messages)
            new.write_manifest(self.run)
        self.checkpoint = new
        prune(self.folder.checkpoints, new.best)

    def finish(self) -> dict[str, Any]:
        """Write every client's folder and the final scores."""
        number, messages = self.checkpoint.round, self.server.messages(self.facts.clients)
        if not all(self.folder.scores(client, number).is_file() for client in self.facts.clients):
            self._evaluate(self.checkpoint, messages)  # resumed to fewer rounds, or a site was away
        self.crew.save(self.checkpoint, messages)
        last, best = self._final(number), self.checkpoint.best
        scores = {
            "method": self.facts.method.name,
            "metric": self.facts.config.metric,
            "last": last,
            "best_validation": self._final(best["round"]) if best else None,
        }
        write_json(self.folder.final_scores, scores)
        self.log.emit("run_finished", round=number, mean=last["mean"], worst=last["worst"])
        return scores

    def _train(self, new: Checkpoint) -> list[Outcome]:
        config, number = self.facts.config, new.round
        chosen = sample_clients(self.facts.trainers, self.facts.method.fraction(number), config.seed, number)
        self.log.emit("round_started", round=number, clients=list(chosen))
        outcomes = self.crew.train(chosen, self.server.messages(chosen), self.checkpoint, new)
        for outcome in outcomes:
            if outcome.failure:
                self.log.emit("client_failed", round=number, client=outcome.client, reason=outcome.failure)
        check_some_left([outcome.failure for outcome in outcomes], number, config.training.lr)
        return outcomes

    def _aggregate(self, new: Checkpoint, outcomes: Sequence[Outcome]) -> None:
        arrived = {outcome.client for outcome in outcomes if outcome.delivered}
        self.server.receive(arrived, new.upload, new.round)
        new.uploads, new.seen, new.memory = self.server.uploads, self.server.seen, self.server.memory
        new.keep(self.checkpoint, uploads=new.uploads.keys() - arrived)

    def _log_round(
        self, number: int, outcomes: Sequence[Outcome], drifts: Mapping[int, float | None], seconds: float
    ) -> None:
        trained = [outcome for outcome in outcomes if not outcome.failure]
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
                row_lora_drift=drifts.get(outcome.client),
            )
        self.log.emit(
            "round",
            round=number,
            seconds=seconds,
            loss=group_mean(outcome.stats.loss for outcome in trained),
            product_gap=product_gap(self.server.adapters.values()),
            row_lora_drift=group_mean(drift for drift in drifts.values() if drift is not None),
            bytes_up=sum(outcome.bytes_up for outcome in outcomes),
            bytes_down=sum(outcome.bytes_down for outcome in outcomes),
            peak_memory=peak_memory(),
        )

    def _evaluates(self, number: int) -> bool:
        config = self.facts.config
        return number % config.evaluation.every == 0 or number == config.federation.rounds

    def _evaluate(self, checkpoint: Checkpoint, messages: Mapping[int, Message]) -> None:
        started = time.perf_counter()
        validation = self.crew.score(checkpoint, messages)
        seconds = time.perf_counter() - started
        self.log.emit("evaluated", round=checkpoint.round, seconds=seconds, peak_memory=peak_memory())
        best = checkpoint.best
        metric = metric_of(self.facts.config.metric)
        if validation is not None and (best is None or metric.better(validation, best["score"])):
            checkpoint.best = {"round": checkpoint.round, "score": validation}

    def _final(self, number: int) -> dict[str, Any]:
        metric = self.facts.config.metric
        files = {client: self.folder.scores(client, number) for client in self.facts.clients}
        clients = {str(client): metrics_in(read_json(path)) for client, path in files.items() if path.is_file()}
        if not clients:
            raise UserError(f"round {number}: no site could be scored; add --resume when they are back")
        means = over_clients([scores[metric] for scores in clients.values()], metric)
        return {"round": number, **means, "clients": clients}


def check_some_left(failures: Sequence[str | None], number: int, lr: float) -> None:
    """Refuse to go on after a round in which every client failed.

    Raises:
        UserError: Every client failed.
    """
    if all(failures):
        raise UserError(
            f"round {number}: every client failed ({failures[0]}); a lower training.lr than {lr:g} may help; "
            "finished rounds are safe"
        )
