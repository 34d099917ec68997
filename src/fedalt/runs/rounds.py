"""Runs: start anew or from a checkpoint, go through the rounds, finish."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedalt.compat import settings_0_1, without_later
from fedalt.config import RunConfig, used_code, used_sections
from fedalt.errors import UserError
from fedalt.evaluation.metrics import group_mean, metric_of, metrics_in, over_clients
from fedalt.federation.client import SPENT
from fedalt.federation.diagnostics import product_gap
from fedalt.federation.fixed import LIMIT
from fedalt.federation.server import Server, sample_clients
from fedalt.files import only_one, read_json, write_json
from fedalt.methods.base import Message, Method
from fedalt.methods.registry import title_of
from fedalt.registry import section_of
from fedalt.runs.checkpoint import Checkpoint, load_checkpoint, next_checkpoint, prune, run_id
from fedalt.runs.clients import ClientBackend, ClientReport, LocalClients
from fedalt.runs.devices import Devices, fitting_cohort, started
from fedalt.runs.events import EventLog, Sink, read_events
from fedalt.runs.folder import RunFolder, check_code, kept, placed
from fedalt.runs.setup import NO_VALIDATION, Experiment, RunInfo
from fedalt.runtime import commit, peak_memory, versions


@dataclass
class Loop:
    """One run in progress. Uploads are in the checkpoint's files."""

    info: RunInfo
    backend: ClientBackend
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
            messages = self.server.messages(self.info.clients)
            drifts = self.backend.row_lora_drifts(new, messages)
            self._log_round(new.round, outcomes, drifts, time.perf_counter() - started)
            if self._evaluates(new.round):
                self._evaluate(new, messages)
            new.write_manifest(self.run)
        self.checkpoint = new
        prune(self.folder.checkpoints, new.best_round)

    @property
    def over(self) -> bool:
        """Whether all rounds are done, or so many evaluations have been no better on validation rows as is allowed."""
        evaluation, now, best = self.info.config.evaluation, self.checkpoint.round, self.checkpoint.best
        if now >= self.info.config.federation.rounds:
            return True
        since = sum(map(self._evaluates, range(best["round"] + 1, now + 1))) if best else 0
        return evaluation.early_stop is not None and since >= evaluation.early_stop

    def finish(self) -> dict[str, Any]:
        """Write every client's folder and the final scores."""
        number, messages = self.checkpoint.round, self.server.messages(self.info.clients)
        if not all(self.folder.scores(client, number).is_file() for client in self.info.clients):
            self._evaluate(self.checkpoint, messages)  # resumed to fewer rounds, or a site was away
        self.backend.save(self.checkpoint, messages)
        last, best = self._final(number), self.checkpoint.best
        if best and best["round"] != number and self.backend.keeps_best:
            self._save_best(best["round"])
        early = self.info.config.evaluation.early_stop is not None
        scores = {
            "method": self.info.method.name,
            "metric": self.info.config.metric,
            "last": last,
            "best_validation": self._final(best["round"]) if best else None,
            **({"kept": "best_validation"} if best and early else {}),
            **({"canaries": planted} if (planted := self.info.config.data.canaries) else {}),
        }
        write_json(self.folder.final_scores, scores)
        final = kept(scores)
        means = {"metric": scores["metric"], "mean": final["mean"], "worst": final["worst"]}
        self.folder.key.unlink(missing_ok=True)
        self.log.emit("run_finished", round=number, **means)
        self.folder.seal()
        return scores

    def _save_best(self, number: int) -> None:
        """Write the models of the best round, as its checkpoint has them."""
        found = load_checkpoint(self.folder.checkpoints, upto=number)
        if found is None or found.round != number:
            return
        found.restore(self.server)
        self.backend.save(found, self.server.messages(self.info.clients))
        self.checkpoint.restore(self.server)

    def _train(self, new: Checkpoint) -> list[ClientReport]:
        config, number = self.info.config, new.round
        chosen = sample_clients(self.info.trainers, self.info.method.fraction(number), config.seed, number)
        self.log.emit("round_started", round=number, clients=list(chosen))
        outcomes = self.backend.train(chosen, self.server.messages(chosen), self.checkpoint, new)
        for outcome in outcomes:
            if outcome.failure:
                self.log.emit("client_failed", round=number, client=outcome.client, reason=outcome.failure)
            if outcome.cut:
                text = f"client {outcome.client}: {outcome.cut} numbers of its upload were cut to ±{LIMIT}"
                self.log.emit("note", round=number, text=text)
        check_some_left([outcome.failure for outcome in outcomes], number, config.training.lr)
        return outcomes

    def _aggregate(self, new: Checkpoint, outcomes: Sequence[ClientReport]) -> None:
        arrived = {outcome.client for outcome in outcomes if outcome.delivered}
        self.server.receive(arrived, new.upload, new.round, new.summed)
        new.uploads, new.seen, new.memory = self.server.uploads, self.server.seen, self.server.memory
        new.summed = self.server.summed
        new.keep(self.checkpoint, uploads=() if new.summed else new.uploads.keys() - arrived)

    def _log_round(
        self, number: int, outcomes: Sequence[ClientReport], drifts: Mapping[int, float | None], seconds: float
    ) -> None:
        trained = [outcome for outcome in outcomes if not outcome.failure]
        for outcome in trained:
            self.log.emit(
                "client",
                round=number,
                client=outcome.client,
                loss=None if math.isnan(outcome.stats.loss) else outcome.stats.loss,
                steps=outcome.stats.steps,
                tokens=outcome.stats.tokens,
                bytes_up=outcome.bytes_up,
                bytes_down=outcome.bytes_down,
                alpha=list(outcome.stats.alpha),
                row_lora_drift=drifts.get(outcome.client),
                **({} if outcome.stats.epsilon is None else {"epsilon": outcome.stats.epsilon}),
            )
        self.log.emit(
            "round",
            round=number,
            seconds=seconds,
            loss=group_mean(outcome.stats.loss for outcome in trained if not math.isnan(outcome.stats.loss)),
            product_gap=None if self.server.config.secure else product_gap(self.server.adapters.values()),
            row_lora_drift=group_mean(drift for drift in drifts.values() if drift is not None),
            bytes_up=sum(outcome.bytes_up for outcome in outcomes),
            bytes_down=sum(outcome.bytes_down for outcome in outcomes),
            peak_memory=peak_memory(),
        )

    def _evaluates(self, number: int) -> bool:
        config = self.info.config
        return number % config.evaluation.every == 0 or number == config.federation.rounds

    def _evaluate(self, checkpoint: Checkpoint, messages: Mapping[int, Message]) -> None:
        started = time.perf_counter()
        validation = self.backend.score(checkpoint, messages)
        seconds = time.perf_counter() - started
        self.log.emit("evaluated", round=checkpoint.round, seconds=seconds, peak_memory=peak_memory())
        best = checkpoint.best
        metric = metric_of(self.info.config.metric)
        if validation is None and best is None and self.info.config.evaluation.early_stop:
            raise UserError(NO_VALIDATION)
        if validation is not None and (best is None or metric.better(validation, best["score"])):
            checkpoint.best = {"round": checkpoint.round, "score": validation}

    def _final(self, number: int) -> dict[str, Any]:
        metric = self.info.config.metric
        files = {client: self.folder.scores(client, number) for client in self.info.clients}
        clients = {str(client): metrics_in(read_json(path)) for client, path in files.items() if path.is_file()}
        if not clients and self.info.config.privacy.report == "none":
            return {"round": number, "mean": None, "worst": None, "p10": None, "clients": {}}
        if not clients:
            raise UserError(f"round {number}: no site could be scored; add --resume when they are back")
        means = over_clients([scores[metric] for scores in clients.values()], metric)
        return {"round": number, **means, "clients": clients}


class BudgetError(UserError):
    """No client may train any more."""


def check_budget(failures: Sequence[str | None], number: int) -> None:
    """End a run in which nobody may train any more."""
    if all(failure and SPENT in failure for failure in failures):
        raise BudgetError(f"no round {number}: privacy.epsilon is spent at every client")


def check_some_left(failures: Sequence[str | None], number: int, lr: float) -> None:
    """Refuse to go on after a round in which every client failed."""
    check_budget(failures, number)
    if all(failures):
        raise UserError(
            f"round {number}: every client failed ({failures[0]}); a lower training.lr than {lr:g} may help; "
            "finished rounds are safe"
        )


_FREE: dict[str, Any] = {
    "out": True,
    "report": True,
    "plugins": True,
    "federation": {"cohort", "devices"},
    "evaluation": {"early_stop"},
    "flower": {"min_sites", "round_deadline", "allow_two", "client_gpus"},
}
"""Settings that may differ when a run is resumed; rounds may be raised, too, unless the method plans by them."""

_MEMORY = "peak memory is that of the process that aggregates; the worker on each device holds a base besides"


def run(experiment: Experiment, folder: RunFolder, sink: Sink = lambda event: None) -> dict[str, Any]:
    """Run, or go on with, an experiment in its claimed folder, to the end.

    Returns:
        The content of ``final_scores.json``.
    """
    info, config, log = experiment.info, experiment.config, EventLog(folder.events, sink)
    with only_one(folder.path):
        run_, checkpoint = find_checkpoint(info, folder)
        with started(experiment, folder) as pool:
            size = config.federation.cohort or (checkpoint.cohort if checkpoint else fitting_cohort(experiment, pool))
            experiment = experiment.with_cohort(size)
            parts = (experiment, folder, log)
            backend = Devices(*parts, pool=pool) if pool else LocalClients(*parts)
            loop = start(
                replace(info, config=experiment.config), backend, folder, log, run_, checkpoint=checkpoint, cohort=size
            )
            if pool and not any(event.get("text") == _MEMORY for event in read_events(folder.events)):
                log.emit("note", round=loop.checkpoint.round, text=_MEMORY)
            return go(loop)


def go(loop: Loop, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """All rounds that are left, each after a check that may refuse to go on, and the end."""
    try:
        while not loop.over:
            check()
            loop.round()
    except BudgetError as error:
        if not loop.checkpoint.round:
            raise
        loop.log.emit("note", round=loop.checkpoint.round, text=str(error))
    number, best = loop.checkpoint.round, loop.checkpoint.best
    if best and loop.over and number < loop.info.config.federation.rounds:
        text = f"stopped after round {number}: no better score on validation rows since round {best['round']}"
        loop.log.emit("note", round=number, text=text)
    return loop.finish()


def find_checkpoint(info: RunInfo, folder: RunFolder) -> tuple[str, Checkpoint | None]:
    """What identifies the run, and its newest checkpoint in a folder, if a round has finished."""
    config = info.config
    check_code(folder, config)
    folder.check("partition.json", "events.jsonl", "results/scores_", "results/eval_")
    frozen = frozen_settings(config, info.method)
    known_by = placed(frozen), frozen, settings_0_1(_frozen(config, info.method))
    run_, *older = (run_id(settings, info.base, info.rows) for settings in known_by if settings is not None)
    checkpoint = load_checkpoint(folder.checkpoints, run_, *older)
    if checkpoint and checkpoint.round > config.federation.rounds:
        raise UserError(
            f"federation.rounds: {config.federation.rounds} asked for, but {folder.path} has finished "
            f"{checkpoint.round} rounds"
        )
    return run_, checkpoint


def frozen_settings(config: RunConfig, method: Method) -> dict[str, Any]:
    """The settings that a run's numbers depend on, as JSON: of code its text, wherever it lies."""
    values = _frozen(config, method)
    for name in config.sections.keys() - {section_of(type(method)), *used_sections(config)}:
        del values[name]
    if code := used_code(config):
        values["code"] = code
    return values


def _frozen(config: RunConfig, method: Method) -> dict[str, Any]:
    """The settings without those that are free, with the sections of all methods."""
    values = config.model_dump(mode="json", exclude=_FREE)
    if not method.plans_by_rounds:
        del values["federation"]["rounds"]
    if not config.evaluation.metrics:
        del values["evaluation"]["metrics"]  # as before there was such a setting
    return without_later(values)


def start(
    info: RunInfo,
    backend: ClientBackend,
    folder: RunFolder,
    log: EventLog,
    run_: str,
    *,
    checkpoint: Checkpoint | None,
    cohort: int = 1,
    server: Server | None = None,
) -> Loop:
    """A run that is ready for its next round, with the beginning of its folder written or what a kill left tidied."""
    server = server or Server(info.method, info.config.federation, info.samples, info.shapes)
    if checkpoint:
        checkpoint.restore(server)
    last = replace(checkpoint or Checkpoint(folder.checkpoints / "round_0000", 0), cohort=cohort)
    loop = Loop(info, backend, folder, log, server, last, run_)
    _write_start(loop, resumed=checkpoint is not None)
    return loop


def _write_start(loop: Loop, resumed: bool) -> None:
    info, folder, done = loop.info, loop.folder, loop.checkpoint.round
    about = {**versions(), "commit": commit()}
    folder.digests.unlink(missing_ok=True)  # until it has finished again
    if resumed:
        loop.log.truncate(done)
        folder.clean_results(done)
        prune(folder.checkpoints, loop.checkpoint.best_round)
        if not loop.over:
            folder.final_scores.unlink(missing_ok=True)
    else:
        folder.events.unlink(missing_ok=True)
        write_json(folder.partition, info.partition)
    folder.write_config(info.config, [f"{name}: {value}" for name, value in about.items() if value])
    log_start(loop.log, info, loop.run, done, resumed=resumed)


def log_start(log: EventLog, info: RunInfo, run_: str, done: int, *, resumed: bool) -> None:
    """Say what run this is; at a site, of the one client that it has."""
    log.emit(
        "run_resumed" if resumed else "run_started",
        round=done,
        method=info.config.method,
        title=title_of(info.config.method),
        code=used_code(info.config),
        clients=list(info.clients),
        tasks=dict(info.tasks),
        rounds=info.config.federation.rounds,
        source=info.source,
        metric=info.config.metric,
        base=info.base,
        run=run_,
        shared_parameters=info.shared,
        trainable_parameters=info.trainable,
        versions={**versions(), "commit": commit()},
    )
    for note in () if resumed else info.notes:
        log.emit("note", round=done, text=note)
