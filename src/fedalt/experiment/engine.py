"""Runs on one machine: start anew or from a checkpoint, go through the rounds, finish."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedalt.data.load import load_held_out
from fedalt.data.record import record
from fedalt.errors import UserError
from fedalt.experiment.checkpoint import Checkpoint, load_checkpoint, prune, run_id
from fedalt.experiment.events import EventLog, Sink
from fedalt.experiment.folder import RunFolder
from fedalt.experiment.loop import Loop
from fedalt.experiment.machine import commit, versions
from fedalt.experiment.prepare import Experiment
from fedalt.federation.server import Server
from fedalt.files import write_json
from fedalt.methods.budget import trainable

_FREE = {"out", "report"}
"""Settings that may differ when a run is resumed; rounds may be raised, unless the method plans by them, and the cohort
may change, too."""


def run(experiment: Experiment, folder: RunFolder, sink: Sink = lambda event: None) -> dict[str, Any]:
    """Run, or go on with, an experiment in its claimed folder, to the end.

    Returns:
        The content of ``final_scores.json``.

    Raises:
        UserError: The folder holds another run, or one that has gone further; the disk is full; every client failed.
    """
    loop = _start(experiment, folder, sink)
    while loop.checkpoint.round < experiment.config.federation.rounds:
        loop.round()
    return loop.finish()


def _start(experiment: Experiment, folder: RunFolder, sink: Sink) -> Loop:
    config = experiment.config
    frozen_settings = config.model_dump(mode="json", exclude={*_FREE, "federation"})
    free = {"cohort"} if experiment.method.foresees else {"rounds", "cohort"}
    frozen_settings["federation"] = config.federation.model_dump(mode="json", exclude=free)
    run_ = run_id(frozen_settings, experiment.resident.base.sha256, experiment.rows_digest)
    checkpoint = load_checkpoint(folder.checkpoints, run_)
    if checkpoint and checkpoint.round > config.federation.rounds:
        raise UserError(
            f"federation.rounds: {config.federation.rounds} asked for, but {folder.path} has finished "
            f"{checkpoint.round} rounds"
        )
    cohort = config.federation.cohort or (checkpoint.cohort if checkpoint else experiment.fitting_cohort)
    experiment = experiment.with_cohort(cohort)
    samples = {client: len(mine.train) for client, mine in experiment.examples.items()}
    server = Server(experiment.method, config.federation, samples, experiment.upload_shapes)
    if checkpoint:
        checkpoint.restore(server)
    last = replace(checkpoint or Checkpoint(folder.checkpoints / "round_0000", 0), cohort=cohort)
    loop = Loop(experiment, folder, EventLog(folder.events, sink), server, last, run_)
    _write_start(loop, resumed=checkpoint is not None)
    return loop


def _write_start(loop: Loop, resumed: bool) -> None:
    experiment, folder, done = loop.experiment, loop.folder, loop.checkpoint.round
    about = {**versions(), "commit": commit()}
    if resumed:
        loop.log.truncate(done)
        folder.clean_results(done)
        prune(folder.checkpoints, loop.checkpoint.best)
        if done < experiment.config.federation.rounds:
            folder.final_scores.unlink(missing_ok=True)  # until it has finished again
    else:
        folder.events.unlink(missing_ok=True)
        write_json(folder.partition, _partition(experiment))
    folder.write_config(experiment.config, [f"{name}: {value}" for name, value in about.items() if value])
    loop.log.emit(
        "run_resumed" if resumed else "run_started",
        round=done,
        method=experiment.config.method,
        clients=list(experiment.federation.ids),
        tasks={str(c): d.train[0].task for c, d in experiment.federation.clients.items()},
        rounds=experiment.config.federation.rounds,
        source=experiment.federation.source,
        metric=experiment.config.metric,
        base=experiment.resident.base.sha256,
        run=loop.run,
        shared_parameters=experiment.sent,
        trainable_parameters=trainable(experiment.method, experiment.shape) + experiment.head_size,
        versions=about,
    )
    for note in () if resumed else experiment.notes:
        loop.log.emit("note", round=done, text=note)


def _partition(experiment: Experiment) -> dict[str, Any]:
    config = experiment.config
    held_out = load_held_out(config.data, config.seed) if config.data.held_out else None
    return record(config.data, config.seed, experiment.federation, held_out)
