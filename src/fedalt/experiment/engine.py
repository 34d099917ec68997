"""Runs on one machine: start anew or from a checkpoint, go through the rounds, finish."""

from __future__ import annotations

from typing import Any

from fedalt.errors import UserError
from fedalt.experiment.checkpoint import load_checkpoint, prune, run_id
from fedalt.experiment.events import EventLog, Sink
from fedalt.experiment.folder import RunFolder
from fedalt.experiment.loop import Loop
from fedalt.experiment.machine import commit, versions
from fedalt.experiment.prepare import Experiment, partition
from fedalt.federation.server import Server
from fedalt.files import write_json
from fedalt.model.state import ClientState, initial_state
from fedalt.names import Tensors

_FREE = {"out"}
"""Settings that may differ when a run is resumed; rounds may be raised, too."""


def run(experiment: Experiment, folder: RunFolder, sink: Sink = lambda event: None) -> dict[str, Any]:
    """Run, or go on with, an experiment in its claimed folder, to the end.

    Returns:
        The content of ``final_scores.json``.

    Raises:
        UserError: The folder holds another run, or one that has gone further; the disk is full; every client failed.
    """
    loop = _start(experiment, folder, sink)
    for number in range(loop.done + 1, experiment.config.federation.rounds + 1):
        loop.round(number)
    return loop.finish()


def _start(experiment: Experiment, folder: RunFolder, sink: Sink) -> Loop:
    config = experiment.config
    frozen_settings = config.model_dump(mode="json", exclude={*_FREE, "federation"})
    frozen_settings["federation"] = config.federation.model_dump(mode="json", exclude={"rounds"})
    run_ = run_id(frozen_settings, experiment.resident.base.sha256, experiment.rows_digest)
    checkpoint = load_checkpoint(folder.checkpoints, run_)
    if checkpoint and checkpoint.round > config.federation.rounds:
        raise UserError(
            f"federation.rounds: {config.federation.rounds} asked for, but {folder.path} has finished "
            f"{checkpoint.round} rounds"
        )
    samples = {client: len(mine.train) for client, mine in experiment.examples.items()}
    states = checkpoint.states if checkpoint else _initial(experiment)
    first = next(iter(states.values()))
    shapes = {key: value for key, value in experiment.shape.shapes().items() if key in experiment.method.upload(first)}
    server = Server(experiment.method, config.federation, samples, shapes)
    loop = Loop(experiment, folder, EventLog(folder.events, sink), server, states, run=run_)
    if checkpoint:
        server.uploads, server.round = checkpoint.uploads, checkpoint.round
        loop.best, loop.done = checkpoint.best, checkpoint.round
    _write_start(loop, resumed=checkpoint is not None)
    return loop


def _write_start(loop: Loop, resumed: bool) -> None:
    experiment, folder = loop.experiment, loop.folder
    about = {**versions(), "commit": commit()}
    if resumed:
        loop.log.truncate(loop.done)
        folder.clean_results(loop.done)
        prune(folder.checkpoints, loop.best)
        if loop.done < experiment.config.federation.rounds:
            folder.final_scores.unlink(missing_ok=True)  # until it has finished again
    else:
        folder.events.unlink(missing_ok=True)
        write_json(folder.partition, partition(experiment.federation))
    folder.write_config(experiment.config, [f"{name}: {value}" for name, value in about.items() if value])
    shared: Tensors = experiment.method.upload(next(iter(loop.states.values())))
    loop.log.emit(
        "run_resumed" if resumed else "run_started",
        round=loop.done,
        method=experiment.method.name,
        clients=list(loop.states),
        tasks={str(c): d.train[0].task for c, d in experiment.federation.clients.items()},
        rounds=experiment.config.federation.rounds,
        source=experiment.federation.source,
        metric=experiment.config.evaluation.metric,
        base=experiment.resident.base.sha256,
        run=loop.run,
        shared_parameters=sum(t.numel() for t in shared.values()),
        trainable_parameters=experiment.shape.size(
            [key for key in experiment.shape.shapes() if experiment.method.trains(key)]
        ),
        versions=about,
    )
    for note in () if resumed else experiment.notes:
        loop.log.emit("note", round=loop.done, text=note)


def _initial(experiment: Experiment) -> dict[int, ClientState]:
    lora, seed = experiment.config.lora, experiment.config.seed
    return {
        client: initial_state(experiment.shape, client, seed, lora.init, lora.mixer_init, experiment.method.frozen)
        for client in experiment.federation.ids
    }
