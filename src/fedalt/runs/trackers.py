"""Other places where a run's numbers go, through accelerate: TensorBoard, MLflow, Weights & Biases, trackio."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedalt.errors import UserError
from fedalt.evaluation.metrics import group_mean, metrics_in
from fedalt.runs.events import Event, Sink

PROJECT = "fedalt"
"""Project or experiment where a tracker sorts its runs into such."""


def check_trackers(names: Sequence[str]) -> None:
    """Say what to install.

    Raises:
        UserError: A tracker's package is not installed.
    """
    for name in names:
        if find_spec(name) is None:
            raise UserError(f'report.trackers: "{name}" is not installed; pip install {name}')


@contextmanager
def tracked(names: Sequence[str], out: Path, sink: Sink) -> Iterator[Sink]:
    """A sink that passes events on and tells the trackers; they are closed however the block ends.

    Args:
        names: Trackers.
        out: Folder of the run, or of the runs of a comparison; TensorBoard's files go to ``tensorboard/`` there.
        sink: Where events go, too.
    """
    if not names:
        yield sink
        return
    jobs = defaultdict[int, Trackers](lambda: Trackers(names, out, sink))

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
    and their mean (``loss/3``, ``loss/mean``), and after scoring every metric in the same way (``rouge1/3``, …).
    """

    def __init__(self, names: Sequence[str], out: Path, complain: Sink) -> None:
        self.names = names
        self.out = out
        self.complain = complain
        self.member = ""
        self.running: list[Any] = []
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
            shutil.rmtree(self._logs, ignore_errors=True)
        about = {k: event[k] for k in ("method", "source", "rounds", "metric", "base", "run")}
        self.running = [_start(name, self.member or self.out.name, about, self._logs) for name in self.names]

    _on_run_resumed = _on_run_started

    def _on_client(self, event: Event) -> None:
        self.losses[f"loss/{event['client']}"] = event["loss"]

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

    @property
    def _logs(self) -> Path:
        return self.out / "tensorboard" / self.member

    def _log(self, values: Mapping[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.log(dict(values), step=step))

    def _each(self, act: Callable[[Any], None]) -> None:
        for tracker in list(self.running):
            try:
                act(tracker)
            except Exception as error:
                self.running.remove(tracker)
                text = f"{tracker.name} failed ({error}); the run goes on without it"
                self.complain({"event": "note", "text": text})


def _start(name: str, run: str, about: dict[str, Any], logs: Path) -> Any:
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState(cpu=True)  # the trackers ask it whether this is the main process
    kind = LOGGER_TYPE_TO_CLASS[name]
    how = {
        "tensorboard": lambda: kind(run_name=logs.name, logging_dir=logs.parent),
        "mlflow": lambda: kind(experiment_name=PROJECT, run_name=run),
        "wandb": lambda: kind(run_name=PROJECT, name=run, config=about, reinit="create_new"),
        "trackio": lambda: kind(run_name=PROJECT, name=run, config=about),
    }
    try:
        tracker = how[name]()
        tracker.start()
        if name == "mlflow":  # TensorBoard would put them into a run of their own
            tracker.store_init_configuration(about)
    except Exception as error:  # not logged in, no server, a broken package
        raise UserError(f"report.trackers: {name} does not start ({error})") from None
    return tracker
