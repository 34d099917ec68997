"""Clients that join after a run has ended: what they get at once, and what a little training of their own adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedalt.config import RunConfig, used_code
from fedalt.data.federation import Federation
from fedalt.data.load import elsewhere, load_as_it_is, load_held_out
from fedalt.data.record import record
from fedalt.errors import UserError
from fedalt.evaluation.evaluate import Evaluation
from fedalt.evaluation.metrics import metrics_in, over_clients
from fedalt.federation.client import cohort_size, cohorts, installed, train_phases
from fedalt.federation.server import Server
from fedalt.files import new_folder, only_one, write_json
from fedalt.methods.base import Message
from fedalt.model.layer import Placement
from fedalt.model.state import ClientState
from fedalt.runs.checkpoint import Checkpoint, load_checkpoint
from fedalt.runs.client_folder import client_ids, read_client, write_client
from fedalt.runs.clients import plan_phases
from fedalt.runs.events import read_events, run_ids
from fedalt.runs.folder import IfExists, RunFolder, check_folder, finished_run, kept_scores
from fedalt.runs.setup import Experiment, load_resident, prepare

FOLDER = "newcomers"
"""Where newcomers go, inside the run that they join."""


def onboard(
    path: Path, data: str | None, epochs: int, out: Path | None = None, if_exists: IfExists = "ask"
) -> dict[str, Any]:
    """Let new clients join a finished run; nothing of the run changes.

    A newcomer gets what the server would tell a client that it has never heard of: FedALT's row is then the mean of
    all individual LoRAs, with none taken out. Before training, only what came from others answers (FedALT: the row,
    past the mixer; a classification head of its own is as it starts). Then the newcomer trains what the method keeps
    private, and what it would train otherwise, for some epochs, and sends nothing. Li et al., HiLoRA, arXiv 2603.02785,
    adapt unseen clients for 5 epochs; how they did so for FedALT is not published.

    Args:
        path: Run folder.
        data: Rows of the newcomers, in any form that ``data.source`` allows; the clients that the run held out
            if not given.
        epochs: Epochs over their own rows; 0 for none.
        out: Folder of the newcomers, itself fit for ``generate`` and ``export``; ``newcomers`` inside the run if not
            given.
        if_exists: What to do with newcomers that are there already.

    Returns:
        ``clients``: id → task, rows, scores before and after; ``before`` and ``after``: mean, worst, 10th percentile.
    """
    folder, config = finished_run(path)
    target = check_folder(out or path / FOLDER, if_exists, "--overwrite to replace it").path
    if folder.config.resolve().is_relative_to(target.resolve()):
        raise UserError(f"{target}: holds the run itself; choose another --out")
    members = client_ids(folder)
    after = kept_scores(folder)["round"]
    checkpoint = load_checkpoint(folder.checkpoints, *run_ids(read_events(folder.events)), upto=after)
    if checkpoint is None or checkpoint.round != after:
        raise UserError(f"{path}: no checkpoint of round {after}, so nobody can be told what the run has learnt")
    newcomers = _newcomers(config, data, members)
    resident = load_resident(config)
    read_client(folder, members[0], resident.base)  # refuses another base
    experiment = prepare(_settings(config, epochs), resident, newcomers, clients=len(members) + 1)
    experiment = experiment.with_cohort(config.federation.cohort or experiment.fitting_cohort)
    with only_one(path), new_folder(target) as inside:
        joined = RunFolder(inside)
        write_json(joined.partition, record(config.data, config.seed, newcomers))
        joined.write_config(config, [f"clients that joined {path}"])
        scores = _scores(joined, experiment, checkpoint, str(path), epochs)
    return {**scores, "folder": str(target)}


def _scores(target: RunFolder, experiment: Experiment, checkpoint: Checkpoint, run: str, epochs: int) -> dict[str, Any]:
    """What has become of the newcomers, whose models are written."""
    config, newcomers = experiment.config, experiment.federation
    before, after = _join(experiment, checkpoint, target, train=epochs > 0)
    clients: dict[str, dict[str, Any]] = {
        str(client): {
            "task": rows.train[0].task,
            "rows": len(rows.train),
            "before": metrics_in(before[client].scores),
            "after": metrics_in(after[client].scores),
        }
        for client, rows in newcomers.clients.items()
    }
    about = {"method": config.method, "metric": config.metric}
    points = {
        point: over_clients([one[point][config.metric] for one in clients.values()], config.metric)
        for point in ("before", "after")
    }
    scores = {"run": run, **about, "epochs": epochs, "clients": clients, **points}
    write_json(target.onboarding, scores | {"code": used_code(config)})
    last = {"round": checkpoint.round, **points["after"], "clients": {c: v["after"] for c, v in clients.items()}}
    write_json(target.final_scores, {**about, "last": last, "best_validation": None})
    target.seal()
    return scores


def _newcomers(config: RunConfig, data: str | None, members: list[int]) -> Federation:
    """The new clients' rows, numbered after the run's own clients."""
    if data is None:
        found = load_held_out(config.data, config.seed)
        if not found.clients:
            raise UserError("--data: give the newcomers' rows; this run held no clients out (data.held_out)")
    else:
        own = elsewhere(config.data, data).model_copy(update={"validation_rows": 0})
        found = load_as_it_is(own, config.seed)
    start = max(members) + 1
    return replace(found, clients={start + i: rows for i, rows in enumerate(found.clients.values())})


def _settings(config: RunConfig, epochs: int) -> RunConfig:
    trained = config.having("training", local_epochs=max(epochs, 1), max_steps=None)
    return trained.having("evaluation", early_stop=None)


def _join(
    experiment: Experiment, checkpoint: Checkpoint, target: RunFolder, train: bool
) -> tuple[dict[int, Evaluation], dict[int, Evaluation]]:
    """Every newcomer's scores before and after training; its model and answers are written."""
    messages = _server(experiment, checkpoint).messages(experiment.federation.ids)
    method, settings, number = experiment.method, experiment.settings, checkpoint.round
    arrival = Placement(*method.newcomer, method.scale, 0.0)
    before: dict[int, Evaluation] = {}
    after: dict[int, Evaluation] = {}
    clients = experiment.federation.ids
    for part in cohorts(clients, cohort_size(experiment.config.federation, len(clients))):
        states = [_installed(experiment, client, messages) for client in part]
        before |= _scored(experiment, states, arrival)
        if train:
            phases = method.newcomer_phases
            plans = [
                plan_phases(phases, mine.train, c, experiment.config, number + 1, held=mine.validation)
                for c, mine in ((client, experiment.examples[client]) for client in part)
            ]
            states, _ = train_phases(experiment.resident.model, states, phases, plans, settings)
            states = experiment.personalised(states)
            after |= _scored(experiment, states, settings.answering)
        else:
            states = experiment.personalised(states)
        for state in states:
            write_client(target.client(state.client), state, experiment, number)
    after = after or before
    for client, evaluation in after.items():
        target.write_scores(client, number, evaluation.lines, evaluation.scores)
    return before, after


def _server(experiment: Experiment, checkpoint: Checkpoint) -> Server:
    """The server as the run left it, among whose clients is one more."""
    server = Server(experiment.method, experiment.config.federation, {}, experiment.upload_shapes)
    checkpoint.restore(server)
    return server


def _installed(experiment: Experiment, client: int, messages: Mapping[int, Message]) -> ClientState:
    return installed(experiment.method, experiment.initial_state(client), messages.get(client))


def _scored(experiment: Experiment, states: list[ClientState], placement: Placement) -> dict[int, Evaluation]:
    rows = {state.client: experiment.examples[state.client].test for state in states}
    found = experiment.resident.evaluate(states, rows, placement, experiment.config)
    return {evaluation.client: evaluation for evaluation in found}
