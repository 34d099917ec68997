"""What a run will cost, measured on its own first steps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from fedalt.data.batches import Plan
from fedalt.data.encode import Example
from fedalt.experiment.machine import peak_memory
from fedalt.experiment.prepare import Experiment
from fedalt.federation.cohort import cohort_size
from fedalt.federation.executor import run_clients
from fedalt.federation.per_client import PerClient


@dataclass(frozen=True)
class Estimate:
    """Cost of a run, evaluation aside.

    Attributes:
        steps: Optimiser steps of the longest client in all rounds.
        seconds_per_step: Of one step of the whole cohort, on rows of ordinary length.
        seconds: Training in all.
        peak_memory: Bytes after steps on the longest rows.
        bytes_up: Uploads of one round, all clients.
    """

    steps: int
    seconds_per_step: float
    seconds: float
    peak_memory: dict[str, int]
    bytes_up: int


def estimate(experiment: Experiment) -> Estimate:
    """Train a step on every client's longest rows for the memory, then steps on ordinary rows for the time."""
    config = experiment.config
    size = config.training.batch_size
    rows = {c: mine.train for c, mine in experiment.examples.items()}
    _train(experiment, {c: sorted(mine, key=len)[-size:] for c, mine in rows.items()}, 1)
    started = time.perf_counter()
    probe_steps = 3
    _train(experiment, rows, probe_steps)
    per_step = (time.perf_counter() - started) / probe_steps
    longest = max(-(-len(mine) // size) for mine in rows.values())
    steps = longest * config.training.local_epochs * config.federation.rounds
    shared = [key for key in experiment.shape.shapes() if experiment.method.shares(key)]
    chosen = max(int(config.federation.fraction * len(rows)), 1)
    return Estimate(steps, per_step, steps * per_step, peak_memory(), 4 * experiment.shape.size(shared) * chosen)


def _train(experiment: Experiment, rows: Mapping[int, Sequence[Example]], steps: int) -> None:
    config = experiment.config
    size = config.training.batch_size
    plans = {c: Plan(c, tuple(tuple(mine[:size]) for _ in range(steps)), 0) for c, mine in rows.items()}
    states = PerClient(rows, experiment.initial_state)
    cohort = cohort_size(config.federation, len(rows))
    model, settings = experiment.resident.model, experiment.settings
    for _ in run_clients(model, list(rows), states, {}, plans.__getitem__, settings, 0, cohort):
        pass


def row_table(experiment: Experiment) -> list[dict[str, Any]]:
    """Rows and tokens of every client."""
    return [
        {
            "client": client,
            "task": experiment.federation.clients[client].train[0].task,
            "train": len(mine.train),
            "validation": len(mine.validation),
            "test": len(mine.test),
            "skipped": sum(mine.skipped.values()),
            "tokens_mean": mean(map(len, mine.train)),
            "tokens_max": max(map(len, mine.train)),
        }
        for client, mine in experiment.examples.items()
    ]
