"""Runs: start anew or from a checkpoint, go through the rounds, finish."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedalt.compat import settings_0_1
from fedalt.config import RunConfig, used_code, used_sections
from fedalt.errors import UserError
from fedalt.experiment.checkpoint import Checkpoint, load_checkpoint, prune, run_id
from fedalt.experiment.crew import Crew, Facts
from fedalt.experiment.devices import Devices, fitting_cohort, started
from fedalt.experiment.events import EventLog, Sink
from fedalt.experiment.folder import RunFolder, check_code
from fedalt.experiment.loop import Loop
from fedalt.experiment.machine import commit, versions
from fedalt.experiment.prepare import Experiment
from fedalt.experiment.residents import Residents
from fedalt.federation.server import Server
from fedalt.files import write_json
from fedalt.methods.base import Method
from fedalt.methods.registry import section_of, title_of

_FREE: dict[str, Any] = {
    "out": True,
    "report": True,
    "plugins": True,
    "federation": {"cohort", "devices"},
    "flower": {"min_sites", "round_deadline", "allow_two", "client_gpus"},
}
"""Settings that may differ when a run is resumed; rounds may be raised, too, unless the method plans by them."""

_MEMORY = "peak memory is that of the process that aggregates; the worker on each device holds a base besides"


def run(experiment: Experiment, folder: RunFolder, sink: Sink = lambda event: None) -> dict[str, Any]:
    """Run, or go on with, an experiment in its claimed folder, to the end.

    Returns:
        The content of ``final_scores.json``.

    Raises:
        UserError: The folder holds another run, or one that has gone further; the disk is full; every client failed.
    """
    facts, config = experiment.facts, experiment.config
    run_, checkpoint = find_checkpoint(facts, folder)
    log = EventLog(folder.events, sink)
    with started(experiment, folder) as pool:
        size = config.federation.cohort or (checkpoint.cohort if checkpoint else fitting_cohort(experiment, pool))
        experiment = experiment.with_cohort(size)
        here = Residents(experiment, folder, log)
        crew = Devices(here, pool) if pool else here
        loop = start(replace(facts, config=experiment.config), crew, folder, log, run_, checkpoint, size)
        if pool:
            log.emit("note", round=loop.checkpoint.round, text=_MEMORY)
        return go(loop)


def go(loop: Loop) -> dict[str, Any]:
    """All rounds that are left, and the end."""
    while loop.checkpoint.round < loop.facts.config.federation.rounds:
        loop.round()
    return loop.finish()


def find_checkpoint(facts: Facts, folder: RunFolder) -> tuple[str, Checkpoint | None]:
    """What identifies the run, and its newest checkpoint in a folder, if a round has finished.

    Raises:
        UserError: The folder holds another run, one that has gone further, or one of other code.
    """
    config = facts.config
    check_code(folder, config)
    known_by = frozen_settings(config, facts.method), settings_0_1(_frozen(config, facts.method))
    run_, *older = (run_id(settings, facts.base, facts.rows) for settings in known_by if settings is not None)
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
    if not method.depends_on_rounds:
        del values["federation"]["rounds"]
    if not config.evaluation.metrics:
        del values["evaluation"]["metrics"]  # as before there was such a setting
    return values


def start(
    facts: Facts,
    crew: Crew,
    folder: RunFolder,
    log: EventLog,
    run_: str,
    checkpoint: Checkpoint | None,
    cohort: int = 1,
    server: Server | None = None,
) -> Loop:
    """A run that is ready for its next round, with the beginning of its folder written or what a kill left tidied."""
    server = server or Server(facts.method, facts.config.federation, facts.samples, facts.shapes)
    if checkpoint:
        checkpoint.restore(server)
    last = replace(checkpoint or Checkpoint(folder.checkpoints / "round_0000", 0), cohort=cohort)
    loop = Loop(facts, crew, folder, log, server, last, run_)
    _write_start(loop, resumed=checkpoint is not None)
    return loop


def _write_start(loop: Loop, resumed: bool) -> None:
    facts, folder, done = loop.facts, loop.folder, loop.checkpoint.round
    about = {**versions(), "commit": commit()}
    if resumed:
        loop.log.truncate(done)
        folder.clean_results(done)
        prune(folder.checkpoints, loop.checkpoint.best)
        if done < facts.config.federation.rounds:
            folder.final_scores.unlink(missing_ok=True)  # until it has finished again
    else:
        folder.events.unlink(missing_ok=True)
        write_json(folder.partition, facts.partition)
    folder.write_config(facts.config, [f"{name}: {value}" for name, value in about.items() if value])
    loop.log.emit(
        "run_resumed" if resumed else "run_started",
        round=done,
        method=facts.config.method,
        title=title_of(facts.config.method),
        code=used_code(facts.config),
        clients=list(facts.clients),
        tasks=dict(facts.tasks),
        rounds=facts.config.federation.rounds,
        source=facts.source,
        metric=facts.config.metric,
        base=facts.base,
        run=loop.run,
        shared_parameters=facts.shared,
        trainable_parameters=facts.trainable,
        versions=about,
    )
    for note in () if resumed else facts.notes:
        loop.log.emit("note", round=done, text=note)
