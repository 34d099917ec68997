"""Processes that work on the cohorts of a run, one on each device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fedalt.config import RunConfig
from fedalt.experiment.folder import RunFolder
from fedalt.experiment.orders import Order, described
from fedalt.experiment.prepare import Experiment
from fedalt.experiment.processes import Processes
from fedalt.federation.participation import sample_clients
from fedalt.methods.registry import refuse_session
from fedalt.model.base import resolve_device


def check_devices(config: RunConfig) -> None:
    """Refuse devices that this machine does not have, and a method that their processes cannot see.

    Raises:
        UserError: There is no such device, or the method was defined in this session.
    """
    for name in config.federation.devices or ():
        resolve_device(name, "federation.devices")
    if config.federation.devices:
        refuse_session(config, "federation.devices")


@contextmanager
def started(experiment: Experiment, folder: RunFolder) -> Iterator[Workers | None]:
    """A worker for each of a run's devices, until the block ends; nothing where it names no devices."""
    config = experiment.config
    devices = [resolve_device(name, "federation.devices") for name in config.federation.devices or ()]
    if not devices:
        yield None
        return
    models = [config.model.model_copy(update={"device": device}) for device in devices]
    settings = [
        {"config": config.model_copy(update={"model": model}).model_dump(mode="json"), "folder": str(folder.path)}
        for model in models
    ]
    names = [f"the worker on {device}" for device in devices]
    with Processes("cohorts", settings, names, "--devices") as processes:
        yield Workers(experiment, devices, processes)


class Workers:
    """Workers that have a base in memory each; whoever is free gets the next cohort.

    Args:
        experiment: The run.
        devices: The device of each.
        processes: The workers.
    """

    def __init__(self, experiment: Experiment, devices: list[str], processes: Processes) -> None:
        self._experiment, self._devices, self._processes = experiment, devices, processes
        self._fitting: dict[int, int] = {}

    @property
    def fitting_cohort(self) -> int:
        """Clients at a time that fit every device, shared by its workers, and leave none of them without a cohort."""
        while len(self._fitting) < len(self._devices):
            self._hear()
        config, trainers = self._experiment.config, self._experiment.trainers
        chosen = sample_clients(trainers, self._experiment.method.fraction(1), config.seed, 1)
        room = [self._fitting[i] // self._devices.count(device) for i, device in enumerate(self._devices)]
        return max(1, min(*room, -(-len(chosen) // len(self._devices))))

    def answers(self, orders: Iterator[Order], on_progress: Callable[[float], None]) -> list[Any]:
        """Have all orders carried out; the answers are in their order.

        Args:
            orders: What is to be done; the next one is made when somebody is free for it.
            on_progress: Told after every step how many are done, parts of those under way included.

        Raises:
            UserError: As a worker has said, or one was killed; none is left then.
            RuntimeError: A worker failed for another reason; none is left then.
        """
        numbered, answers = enumerate(orders), dict[int, Any]()
        under_way: dict[int, int] = {}
        parts: dict[int, float] = {}
        try:
            for worker in range(len(self._processes)):
                self._hand_out(worker, numbered, under_way)
            while under_way:
                worker, event = self._hear()
                if event["event"] == "step":
                    parts[worker] = event["done"] / event["total"]
                    on_progress(len(answers) + sum(parts.values()))
                elif event["event"] == "done":
                    answers[under_way.pop(worker)] = event["answer"]
                    parts.pop(worker, None)
                    self._hand_out(worker, numbered, under_way)
        except BaseException:
            self._processes.close()  # before what they write into is cleared away
            raise
        return [answers[number] for number in sorted(answers)]

    def _hand_out(self, worker: int, numbered: Iterator[tuple[int, Order]], under_way: dict[int, int]) -> None:
        for number, order in numbered:
            under_way[worker] = number
            self._processes.tell(worker, order, described(order))
            return

    def _hear(self) -> tuple[int, dict[str, Any]]:
        worker, event = self._processes.hear()
        if event["event"] == "ready":
            self._fitting[worker] = event["cohort"]
        return worker, event
