"""The runs of a comparison: what each is; one after another on one base in memory, or in processes with a base each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from fedalt.config import RunConfig, parse_config, with_settings
from fedalt.data.load import Rows
from fedalt.errors import UserError
from fedalt.methods.base import sent, trainable
from fedalt.methods.registry import build, configured
from fedalt.runs.events import Event, Sink
from fedalt.runs.folder import IfExists, RunFolder, claim_folder
from fedalt.runs.pool import Pool, Task
from fedalt.runs.rounds import run
from fedalt.runs.setup import Bases, Resident, load_rows, prepare
from fedalt.runtime import forget_peak_memory

Budget = Literal["parameters", "bytes"]


@dataclass(frozen=True)
class Member:
    """One run of a comparison; ``draw`` is the seed of its draw of rows, where there are several."""

    name: str
    config: RunConfig
    folder: RunFolder
    budget: Budget | None = None
    title: str = ""
    draw: int | None = None

    @property
    def label(self) -> str:
        """How it is called among the runs of its method: by seed, and by draw."""
        return f"{self.config.seed}" if self.draw is None else f"{self.config.seed}/{self.draw}"

    def to_json(self) -> dict[str, Any]:
        """For another process."""
        config = self.config.model_dump(mode="json")
        return {**{k: getattr(self, k) for k in ("name", "budget", "title", "draw")}, "config": config}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Member:
        """In the other process."""
        config = parse_config(value["config"], value["name"])
        return Member(folder=RunFolder(config.folder), **{**value, "config": config})


def train(members: Iterable[Member], if_exists: IfExists, sink: Sink, bases: Bases, rows: Rows | None = None) -> None:
    """Train members one after another, on rows that are read and encoded once for those that ask for the same."""
    rows = rows or Rows()
    for member in members:
        forget_peak_memory()
        config, federation = load_rows(member.config, rows)
        resident = bases.of(config)
        config = _matched(config, member, resident, len(federation.clients))
        experiment = prepare(config, resident, federation, rows=rows)
        claim_folder(member.folder.path, if_exists)
        sink({"event": "member", "method": member.name, "seed": member.label})
        started = time.perf_counter()
        scores = run(experiment, member.folder, sink)
        sink({"event": "member_finished", "scores": scores, "seconds": time.perf_counter() - started})


def train_in_jobs(members: Sequence[Member], jobs: int, if_exists: IfExists, sink: Sink) -> None:
    """Train members in ``jobs`` processes; whoever has finished one gets the next.

    Every process loads the base for itself and has its share of this process's threads. Events have ``job`` added. The
    first error ends all processes; their finished rounds are safe.

    Raises:
        RuntimeError: A process failed for another reason; its traceback is on stderr.
    """
    numbers = range(min(jobs, len(members)))
    tasks = [Task(f"{member.name} seed {member.label}", member.to_json()) for member in members]
    with Pool(_job, [(job, if_exists) for job in numbers], [f"job {job}" for job in numbers], "--jobs") as pool:
        pool.map(tasks, lambda task, event: sink(event), last=True)


def _job(settings: tuple[int, IfExists], sink: Sink) -> Callable[[dict[str, Any]], None]:
    (job, if_exists), bases, rows = settings, Bases(), Rows()

    def numbered(event: Event) -> None:
        sink({**event, "job": job})

    return lambda value: train([Member.from_json(value)], if_exists, numbered, bases, rows)


def _matched(config: RunConfig, member: Member, resident: Resident, clients: int) -> RunConfig:
    if member.budget is None:
        return config
    return matched(config, config.method, resident.model.layer_sizes, clients, member.budget)


def matched(
    config: RunConfig,
    name: str,
    layers: Mapping[str, tuple[int, int]],
    clients: int,
    by: Literal["parameters", "bytes"],
) -> RunConfig:
    """The settings with the rank at which a method trains, or sends, nearest to one LoRA of the configured rank.

    alpha changes with the rank, so that the scale alpha/r stays. A method that sends nothing keeps its rank under
    ``bytes``. Ties go to the lower rank. Mixers come on top and do not count: their size does not depend on the rank.
    """
    measure = trainable if by == "parameters" else sent
    target = sum(config.lora.r * (d_in + d_out) for d_in, d_out in layers.values())
    best: tuple[int, RunConfig] | None = None
    for rank in range(1, 4 * config.lora.r + 1):
        lora = config.lora
        alpha = lora.alpha * (rank / lora.r) ** 0.5 if lora.rslora else lora.alpha * rank / lora.r
        candidate = configured(with_settings(config, {"lora.r": rank, "lora.alpha": alpha}), name)
        method = build(candidate, clients, layers)
        try:
            size = measure(method, replace(method.shape, mixed=False))
        except UserError:  # a rank that the method cannot split
            continue
        if size == 0:
            return configured(config, name)
        if best is None or abs(size - target) < best[0]:
            best = (abs(size - target), candidate)
    if best is None:
        raise UserError(f"{name}: no rank from 1 to {4 * config.lora.r} suits it")
    return best[1]
