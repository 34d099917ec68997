"""Other places where a run's numbers go: TensorBoard, MLflow, Weights & Biases, trackio, and anybody's.

A tracker is a class; an instance of it follows one run:

    @TRACKERS.register("lines")
    class Lines:
        def start(self, run: str, about: dict[str, Any], folder: Path) -> None: ...
        def log(self, values: dict[str, float], step: int) -> None: ...
        def finish(self) -> None: ...

``run`` is the run's name, ``about`` says what it is, ``folder`` is the tracker's own, which it makes if it needs one;
there is none when a run starts anew. ``step`` is the round. Its settings are ``self.settings``: those of its nested
``Settings``, or the section ``report``. A tracker that fails is left out, and the run goes on.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedalt.config.section import Named
from fedalt.errors import UserError
from fedalt.evaluation.metrics import group_mean, metrics_in
from fedalt.registry import TRACKERS
from fedalt.runs.events import Event, Sink

PROJECT = "fedalt"
"""Project or experiment where a tracker sorts its runs into such."""


def check_trackers(names: Sequence[str]) -> None:
    """Say what to install."""
    for name in names:
        if issubclass(TRACKERS.get(name), _Accelerated) and find_spec(name) is None:
            raise UserError(f'report.trackers: "{name}" is not installed; pip install {name}')


@contextmanager
def tracked(names: Sequence[str], out: Path, sink: Sink, config: Named | None = None) -> Iterator[Sink]:
    """A sink that passes events on and tells the trackers; they are closed however the block ends."""
    if not names:
        yield sink
        return
    jobs = defaultdict[int, Trackers](lambda: Trackers(names, out, sink, config or Named()))

    def both(event: Event) -> None:
        sink(event)
        jobs[event.get("job", 0)](event)

    try:
        yield both
    finally:
        for trackers in jobs.values():
            trackers.close()


class Trackers:
    """A sink for one run after another: a tracker run for each, its numbers by round.

    Logged are ``seconds``, ``bytes_up``, ``bytes_down``, ``product_gap``, ``row_lora_drift``, the loss of every client
    and their mean (``loss/3``, ``loss/mean``), its ``epsilon/3`` where steps are private, and after scoring every
    metric in the same way (``rouge1/3``, …).
    """

    def __init__(self, names: Sequence[str], out: Path, complain: Sink, config: Named) -> None:
        self.names, self.config = names, config
        self.out = out
        self.complain = complain
        self.member = ""
        self.running: list[tuple[str, Any]] = []
        self.scores: dict[str, dict[str, float]] = {}
        self.losses: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        """Follow one event."""
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler:
            handler(event)

    def close(self) -> None:
        """End the tracker runs, for a run that ended or broke off."""
        self._each(lambda tracker: tracker.finish())
        self.running = []

    def _on_member(self, event: Event) -> None:
        self.member = f"{event['method']}-seed{event['seed']}"

    def _on_run_started(self, event: Event) -> None:
        self.close()
        if event["event"] == "run_started":
            for name in self.names:
                shutil.rmtree(self.out / name / self.member, ignore_errors=True)
        about = {k: event[k] for k in ("method", "source", "rounds", "metric", "base", "run")}
        self.running = [(name, self._start(name, about)) for name in self.names]

    _on_run_resumed = _on_run_started

    def _on_client(self, event: Event) -> None:
        found = {name: event.get(name) for name in ("loss", "epsilon")}
        self.losses |= {f"{name}/{event['client']}": value for name, value in found.items() if value is not None}

    def _on_round(self, event: Event) -> None:
        names = {name: name for name in ("seconds", "bytes_up", "bytes_down", "product_gap", "row_lora_drift")}
        names["loss"] = "loss/mean"
        values = {tag: event[name] for name, tag in names.items() if event[name] is not None}
        self._log(values | self.losses, event["round"])
        self.losses = {}

    def _on_scores(self, event: Event) -> None:
        if event["point"] == "after":
            self.scores[str(event["client"])] = metrics_in(event)

    def _on_evaluated(self, event: Event) -> None:
        values = {f"{name}/{c}": score for c, scores in self.scores.items() for name, score in scores.items()}
        for name in dict.fromkeys(name for scores in self.scores.values() for name in scores):
            mean = group_mean(scores[name] for scores in self.scores.values())
            values |= {} if mean is None else {f"{name}/mean": mean}
        self._log(values, event["round"])
        self.scores = {}

    def _on_run_finished(self, event: Event) -> None:
        self.close()

    def _start(self, name: str, about: dict[str, Any]) -> Any:
        tracker = TRACKERS.make(name, self.config.section, self.config)
        try:
            tracker.start(self.member or self.out.name, dict(about), self.out / name / self.member)
        except Exception as error:  # not logged in, no server, a broken package
            raise UserError(f"report.trackers: {name} does not start ({error})") from None
        return tracker

    def _log(self, values: Mapping[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.log(dict(values), step=step))

    def _each(self, act: Callable[[Any], None]) -> None:
        for name, tracker in list(self.running):
            try:
                act(tracker)
            except Exception as error:
                self.running.remove((name, tracker))
                text = f"{name} failed ({error}); the run goes on without it"
                self.complain({"event": "note", "text": text})


class _Accelerated:
    """A tracker that accelerate knows; its package has the tracker's name."""

    name = ""

    def start(self, run: str, about: dict[str, Any], folder: Path) -> None:
        """Begin a run there."""
        from accelerate.state import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState(cpu=True)  # the trackers ask it whether this is the main process
        kind: Any = LOGGER_TYPE_TO_CLASS[self.name]
        self.tracker = kind(**self.place(run, about, folder))
        self.tracker.start()

    def place(self, run: str, about: dict[str, Any], folder: Path) -> dict[str, Any]:
        """What accelerate is told of a run."""
        return {"run_name": PROJECT, "name": run, "config": about}

    def log(self, values: dict[str, float], step: int) -> None:
        """Pass numbers on."""
        self.tracker.log(values, step=step)

    def finish(self) -> None:
        """The run has ended."""
        self.tracker.finish()


@TRACKERS.register("tensorboard")
class TensorBoard(_Accelerated):
    """Files in ``tensorboard/`` of the run's folder, or of the comparison's."""

    def place(self, run: str, about: dict[str, Any], folder: Path) -> dict[str, Any]:
        """A folder; what a run is would be put into a run of its own."""
        return {"run_name": folder.name, "logging_dir": folder.parent}


@TRACKERS.register("mlflow")
class MLflow(_Accelerated):
    """An experiment of the server that ``MLFLOW_TRACKING_URI`` names."""

    def start(self, run: str, about: dict[str, Any], folder: Path) -> None:
        """Begin a run there."""
        super().start(run, about, folder)
        self.tracker.store_init_configuration(about)

    def place(self, run: str, about: dict[str, Any], folder: Path) -> dict[str, Any]:
        """An experiment, and the run's name in it."""
        return {"experiment_name": PROJECT, "run_name": run}


@TRACKERS.register("wandb")
class WeightsAndBiases(_Accelerated):
    """A run at wandb.ai."""

    def place(self, run: str, about: dict[str, Any], folder: Path) -> dict[str, Any]:
        """A project, and a run beside those that are under way."""
        return {**super().place(run, about, folder), "reinit": "create_new"}


@TRACKERS.register("trackio")
class Trackio(_Accelerated):
    """A run of trackio's dashboard."""
