"""The rounds of one run: sample, train, aggregate, score, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedalt.data.batches import Plan, plan_round
from fedalt.data.encode import Example
from fedalt.errors import UserError
from fedalt.evaluation.evaluate import Evaluation, evaluate
from fedalt.evaluation.metrics import METRICS, group_mean
from fedalt.experiment.checkpoint import save_checkpoint
from fedalt.experiment.clients import write_client
from fedalt.experiment.events import EventLog
from fedalt.experiment.folder import RunFolder
from fedalt.experiment.machine import peak_memory
from fedalt.experiment.prepare import Experiment
from fedalt.federation.client import ClientResult
from fedalt.federation.diagnostics import row_drift, row_gap
from fedalt.federation.executor import run_clients
from fedalt.federation.participation import sample_clients
from fedalt.federation.server import Server
from fedalt.files import read_json, write_json
from fedalt.model.state import ClientState


@dataclass
class Loop:
    """One run in progress.

    Attributes:
        experiment: What to run.
        folder: Where everything goes.
        log: Event log.
        states: Every client's state after the last finished round.
        server: Aggregation and its memory.
        best: Best round on validation rows so far.
    """

    experiment: Experiment
    folder: RunFolder
    log: EventLog
    server: Server
    states: dict[int, ClientState]
    best: dict[str, Any] | None = None
    run: str = ""
    done: int = field(default=0)

    def round(self, number: int) -> None:
        """One round, from sampling to checkpoint."""
        started = time.perf_counter()
        results = self._train(number)
        before = {**self.states, **{result.state.client: result.state for result in results}}
        arrived = {r.state.client: r.upload for r in results if r.upload}
        self.server.receive(arrived, number)
        after = self._install_everywhere(before)
        self._log_round(number, results, before, after, time.perf_counter() - started)
        if self._evaluates(number):
            self._evaluate(number, before, after)
        self.states = before
        save_checkpoint(self.folder.checkpoints, self.run, self.server, self.states, self.best)
        self.done = number

    def finish(self) -> dict[str, Any]:
        """Write every client's folder and the final scores."""
        final = self._install_everywhere(self.states)
        if not all(self.folder.scores(client, self.done).is_file() for client in final):  # resumed to fewer rounds
            self._evaluate(self.done, self.states, final)
        for state in final.values():
            write_client(self.folder.client(state.client), state, self.experiment, self.done)
        last = self._final(self.done)
        scores = {
            "method": self.experiment.method.name,
            "metric": self.experiment.config.evaluation.metric,
            "last": last,
            "best_validation": self._final(self.best["round"]) if self.best else None,
        }
        write_json(self.folder.final_scores, scores)
        self.log.emit("run_finished", round=self.done, mean=last["mean"], worst=last["worst"])
        return scores

    def _train(self, number: int) -> list[ClientResult]:
        config = self.experiment.config
        chosen = sample_clients(tuple(self.states), config.federation.fraction, config.seed, number)
        messages = self.server.messages(chosen)
        self.log.emit("round_started", round=number, clients=list(chosen))
        results = run_clients(
            self.experiment.resident.model,
            [self.states[c] for c in chosen],
            [messages.get(c) for c in chosen],
            [self._plan(c, number) for c in chosen],
            self.experiment.settings,
            number,
            config.federation.executor,
            config.federation.cohort,
            lambda done, total: self.log.sink({"event": "step", "round": number, "done": done, "total": total}),
        )
        for result in results:
            if result.failure:
                self.log.emit("client_failed", round=number, client=result.state.client, reason=result.failure)
        if all(result.failure for result in results):
            raise UserError(
                f"round {number}: every client failed ({results[0].failure}); "
                f"a lower training.lr than {config.training.lr:g} may help; finished rounds are safe"
            )
        return results

    def _plan(self, client: int, number: int) -> Plan:
        config = self.experiment.config
        return plan_round(
            self.experiment.examples[client].train,
            client,
            config.training.local_epochs,
            config.training.batch_size,
            config.seed,
            number,
            config.training.repeat_order,
        )

    def _install_everywhere(self, states: Mapping[int, ClientState]) -> dict[int, ClientState]:
        """Every client as it would start the next round: what is scored, saved and chatted with."""
        method, messages = self.experiment.method, self.server.messages(tuple(states))
        return {c: method.install(s, messages[c]) if c in messages else s for c, s in states.items()}

    def _log_round(
        self,
        number: int,
        results: Sequence[ClientResult],
        before: Mapping[int, ClientState],
        after: Mapping[int, ClientState],
        seconds: float,
    ) -> None:
        size = {r.state.client: sum(t.numel() * t.element_size() for t in r.upload.values()) for r in results}
        for result in results:
            if result.failure:
                continue
            client, stats = result.state.client, result.stats
            self.log.emit(
                "client",
                round=number,
                client=client,
                loss=stats.loss,
                steps=stats.steps,
                tokens=stats.tokens,
                bytes_up=size[client],
                bytes_down=size[client] if number > 1 else 0,
                alpha=list(result.alpha),
                row_drift=row_drift(before[client].tensors, after[client].tensors),
            )
        uploads = [upload.tensors for upload in self.server.uploads.values()]
        drifts = [row_drift(before[c].tensors, after[c].tensors) for c in before]
        self.log.emit(
            "round",
            round=number,
            seconds=seconds,
            loss=group_mean(r.stats.loss for r in results if not r.failure),
            row_gap=row_gap(uploads) if uploads else None,
            row_drift=group_mean(drift for drift in drifts if drift is not None),
            bytes_up=sum(size.values()),
            bytes_down=sum(size.values()) if number > 1 else 0,
            peak_memory=peak_memory(),
        )

    def _evaluates(self, number: int) -> bool:
        config = self.experiment.config
        return number % config.evaluation.every == 0 or number == config.federation.rounds

    def _evaluate(self, number: int, before: Mapping[int, ClientState], after: Mapping[int, ClientState]) -> None:
        started = time.perf_counter()
        scored = self._score(after, "test")
        same = all(before[c].tensors is after[c].tensors for c in before)
        earlier = None
        if "before" in self.experiment.config.evaluation.points:
            earlier = scored if same else self._score(before, "test")
        validation = self._score(after, "validation")
        for client, evaluation in scored.items():
            extra = {
                "before_aggregation": earlier[client].scores if earlier else None,
                "validation": validation[client].scores if client in validation else None,
            }
            self.folder.write_scores(client, number, evaluation.lines, evaluation.scores | extra)
        self._log_scores(number, {"after": scored, "before": earlier or {}, "validation": validation})
        self.log.emit("evaluated", round=number, seconds=time.perf_counter() - started)
        self._note_best(number, validation)

    def _score(self, states: Mapping[int, ClientState], split: str) -> dict[int, Evaluation]:
        rows: dict[int, Sequence[Example]] = {c: getattr(self.experiment.examples[c], split) for c in states}
        present = [state for client, state in states.items() if rows[client]]
        resident, settings = self.experiment.resident, self.experiment.settings
        scored = evaluate(
            resident.model,
            resident.base.tokenizer,
            present,
            rows,
            settings.placement,
            self.experiment.config.evaluation,
        )
        return {evaluation.client: evaluation for evaluation in scored}

    def _log_scores(self, number: int, points: Mapping[str, Mapping[int, Evaluation]]) -> None:
        for point, evaluations in points.items():
            for client, evaluation in evaluations.items():
                scores = {name: evaluation.scores[name] for name in METRICS}
                self.log.emit("scores", round=number, client=client, point=point, **scores)

    def _note_best(self, number: int, validation: Mapping[int, Evaluation]) -> None:
        score = group_mean(e.scores[self.experiment.config.evaluation.metric] for e in validation.values())
        if score is not None and (self.best is None or score > self.best["score"]):
            self.best = {"round": number, "score": score}

    def _final(self, number: int) -> dict[str, Any]:
        metric = self.experiment.config.evaluation.metric
        files = {c: read_json(self.folder.scores(c, number)) for c in self.states}
        clients = {str(c): {name: file[name] for name in METRICS} for c, file in files.items()}
        main = [scores[metric] for scores in clients.values()]
        return {"round": number, "mean": group_mean(main), "worst": min(main), "clients": clients}
