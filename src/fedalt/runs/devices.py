"""Clients on several devices of one machine: their cohorts are worked on by processes with a base each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedalt.config import RunConfig, parse_config
from fedalt.errors import listed
from fedalt.federation.client import cohort_size, cohorts
from fedalt.federation.server import sample_clients
from fedalt.files import filling, scratch_folder
from fedalt.methods.base import Message
from fedalt.methods.registry import refuse_session
from fedalt.model.base import resolve_device
from fedalt.model.state import load_tensors, save_tensors
from fedalt.names import Tensors
from fedalt.runs.checkpoint import Checkpoint
from fedalt.runs.clients import ClientReport, LocalClients
from fedalt.runs.events import Event, EventLog, Sink
from fedalt.runs.folder import RunFolder
from fedalt.runs.pool import Pool, Task
from fedalt.runs.scoring import Points
from fedalt.runs.setup import Experiment, prepare

Filed = dict[int, tuple[Path, float]]
"""Client → file of the tensors that the server sends it, and its share in them."""


def check_devices(config: RunConfig) -> list[str]:
    """A run's devices by their full names; none where it names none."""
    if config.federation.devices:
        refuse_session(config, "federation.devices")
    return [resolve_device(name, "federation.devices") for name in config.federation.devices or ()]


@contextmanager
def started(experiment: Experiment, folder: RunFolder) -> Iterator[Pool | None]:
    """A process for each of a run's devices, until the block ends; None where it names no devices."""
    config = experiment.config
    devices = check_devices(config)
    if not devices:
        yield None
        return
    configs = [config.having("model", device=device).model_dump(mode="json") for device in devices]
    names = [f"the worker on {device}" for device in devices]
    with Pool(_work, [(values, folder.path) for values in configs], names, "--devices") as pool:
        yield pool


def fitting_cohort(experiment: Experiment, pool: Pool | None) -> int:
    """Clients at a time that fit every device, shared by its processes, and leave none of them without a cohort."""
    if not pool:
        return experiment.fitting_cohort
    config, devices = experiment.config, check_devices(experiment.config)
    chosen = sample_clients(experiment.trainers, experiment.method.fraction(1), config.seed, 1)
    fitting: list[int] = pool.map([Task("loading the base", (_fitting,))] * len(pool))
    room = [size // devices.count(device) for size, device in zip(fitting, devices, strict=True)]
    return max(1, min(*room, -(-len(chosen) // len(devices))))


@dataclass(frozen=True)
class Devices(LocalClients):
    """The clients of a run on several devices, a process each. Training and scoring are spread; this one aggregates.

    The others read states from the last checkpoint and write new ones into the next, as this process would.
    """

    pool: Pool = field(kw_only=True)

    def trained(
        self, chosen: Sequence[int], messages: Mapping[int, Message], last: Checkpoint, new: Checkpoint
    ) -> list[ClientReport]:
        """Train cohort by cohort, wherever there is a free device."""
        self.experiment.in_folder(self.folder)  # one key for all of them
        done = [report for part in self._spread("training", _train, chosen, messages, last, new) for report in part]
        new.clients |= {report.client for report in done if not report.failure}
        return done

    def scored(self, clients: Sequence[int], new: Checkpoint, messages: Mapping[int, Message]) -> Points:
        """Score some, wherever there is a free device."""
        points: Points = {}
        for part in self._spread("scoring", _score, clients, messages, new):
            for point, scores in part.items():
                points.setdefault(point, {}).update(scores)
        return points

    def _spread(
        self,
        doing: str,
        do: Callable[..., Any],
        clients: Sequence[int],
        messages: Mapping[int, Message],
        *checkpoints: Checkpoint,
    ) -> list[Any]:
        """Results of ``do(here, clients, messages in files, *checkpoints)``, cohort by cohort."""
        size, new = cohort_size(self.experiment.config.federation, len(clients)), checkpoints[-1]
        count = -(-len(clients) // size)
        progress: dict[int, float] = {}

        def tasks(outbox: Outbox) -> Iterator[Task]:
            for part in cohorts(clients, size):
                mine = [Checkpoint(c.path, c.round, c.clients.intersection(part)) for c in checkpoints]
                what = f"{doing} clients {listed(part)} in round {new.round}"
                yield Task(what, (do, part, outbox.of(part), *mine))

        def on_event(task: int, event: Event) -> None:
            progress[task] = event["done"] / event["total"]
            done = sum(progress.values())
            self.log.sink({"event": "step", "round": new.round, "done": done, "total": count})

        with scratch_folder(new.path.with_name(f".round_{new.round:04d}.messages")) as folder:
            return self.pool.map(tasks(Outbox(folder, messages)), on_event)


class Outbox:
    """Messages in files of a folder: one file for all who are told the same, made when they are asked for."""

    def __init__(self, folder: Path, messages: Mapping[int, Message]) -> None:
        self._folder, self._messages = folder, messages
        self._count = 0
        self._latest: Tensors | None = None

    def of(self, clients: Sequence[int]) -> Filed:
        """Where the messages of some clients are."""
        return {client: self._put(self._messages[client]) for client in clients if client in self._messages}

    def _put(self, message: Message) -> tuple[Path, float]:
        if message.tensors is not self._latest:
            self._latest, self._count = message.tensors, self._count + 1
            save_tensors(message.tensors, self._file)
        return self._file, message.share

    @property
    def _file(self) -> Path:
        return self._folder / f"{self._count}.safetensors"


def read(filed: Filed) -> dict[int, Message]:
    """The messages; those of one file share their tensors."""
    files = {file: load_tensors(file) for file, _ in filed.values()}
    return {client: Message(files[file], share) for client, (file, share) in filed.items()}


# ---------------------------------------------------------------------------------------- in the processes of the pool


def _work(settings: tuple[dict[str, Any], Path], sink: Sink) -> Callable[[tuple[Any, ...]], Any]:
    """Load a base; tasks are functions of this process's clients, with their other arguments."""
    config, folder = parse_config(settings[0], "settings"), RunFolder(settings[1])
    device = torch.device(config.model.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    here = LocalClients(prepare(config), folder, EventLog(folder.events, sink))
    return lambda task: task[0](here, *task[1:])


def _fitting(here: LocalClients) -> int:
    return here.experiment.fitting_cohort


def _train(
    here: LocalClients, clients: Sequence[int], filed: Filed, last: Checkpoint, new: Checkpoint
) -> list[ClientReport]:
    with filling(new.path):
        return here.trained(clients, read(filed), last, new)


def _score(here: LocalClients, clients: Sequence[int], filed: Filed, new: Checkpoint) -> Points:
    return here.scored(clients, new, read(filed))
