"""Progress bars: events of runs in, lines of a terminal or of a notebook out."""

from __future__ import annotations

import io
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedalt.evaluation.metrics import Metric, metric_of

_WIDTH = 110
_SECONDS = 0.2
"""Least time between two drawings in a notebook."""


class Live:
    """Turns the events of one run after another into a progress bar.

    Args:
        progress: Where the bar goes.
        rounds: Rounds of a run, until it says so itself.
        notes: What has been printed already; shared by the jobs of a comparison.
    """

    metric: Metric

    def __init__(self, progress: Progress, rounds: int, notes: set[str]) -> None:
        self.progress = progress
        self.rounds = rounds
        self.notes = notes
        self.label = ""
        self.loss = ""
        self.task: TaskID | None = None

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        handler = getattr(self, f"_on_{event['event']}", None)
        if handler:
            handler(event)

    def _on_point(self, event: Mapping[str, Any]) -> None:
        self.progress.console.print(f"[bold]{escape(event['name'])}[/]", soft_wrap=True, highlight=False)

    def _on_member(self, event: Mapping[str, Any]) -> None:
        self.label = f"{event['method']} seed {event['seed']}"

    def _on_run_started(self, event: Mapping[str, Any]) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=self.rounds)
        self.loss, self.rounds, self.metric = "", event["rounds"], metric_of(event["metric"])
        label = self.label or event["method"]
        self.task = self.progress.add_task(label, total=self.rounds, completed=event["round"], state="")

    _on_run_resumed = _on_run_started

    def _on_step(self, event: Mapping[str, Any]) -> None:
        done = event["round"] - 1 + 0.95 * event["done"] / event["total"]
        self._update(done, f"round {event['round']}/{self.rounds}{self.loss}")

    def _on_round(self, event: Mapping[str, Any]) -> None:
        self.loss = "" if event["loss"] is None else f", loss {event['loss']:.3f}"
        self._update(event["round"] - 0.05, f"round {event['round']}/{self.rounds}{self.loss}")

    def _on_evaluated(self, event: Mapping[str, Any]) -> None:
        self._update(event["round"], f"scored in {event['seconds']:.0f} s{self.loss}")

    def _on_run_finished(self, event: Mapping[str, Any]) -> None:
        text = self.metric.text
        self._update(self.rounds, f"mean {text(event['mean'])}, worst {text(event['worst'])}")

    def _on_client_failed(self, event: Mapping[str, Any]) -> None:
        self.progress.console.print(
            f"[yellow]client {event['client']} set aside in round {event['round']}:[/] {escape(event['reason'])}"
        )

    def _on_note(self, event: Mapping[str, Any]) -> None:
        if event["text"] not in self.notes:  # once for all runs of a comparison
            self.notes.add(event["text"])
            self.progress.console.print(f"[dim]note: {escape(event['text'])}[/]", soft_wrap=True)

    def _update(self, completed: float, state: str) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=completed, state=state)


@contextmanager
def on_terminal(console: Console, rounds: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A progress bar for each of the enclosed runs, whichever job of a comparison they come from."""
    with _progress(console) as progress:
        yield _sink(progress, rounds)


@contextmanager
def in_notebook(rounds: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """The same in the output of a notebook's cell, drawn by its own means: no widgets are needed."""
    from IPython import display as ipython

    show: Any = ipython.display
    html: Any = ipython.HTML

    console = Console(file=io.StringIO(), record=True, width=_WIDTH, force_jupyter=False, force_terminal=True)
    progress = _progress(console)
    sink = _sink(progress, rounds)
    handle = show(html(""), display_id=True)
    drawn = 0.0

    def draw() -> None:
        page = Console(file=io.StringIO(), record=True, width=_WIDTH, force_jupyter=False, force_terminal=True)
        page.print(progress.get_renderable())
        notes = console.export_html(clear=False, inline_styles=True, code_format=_PAGE)
        handle.update(html(notes + page.export_html(inline_styles=True, code_format=_PAGE)))

    def follow(event: Mapping[str, Any]) -> None:
        nonlocal drawn
        sink(event)
        if time.monotonic() - drawn > _SECONDS:
            draw()
            drawn = time.monotonic()

    try:
        yield follow
    finally:
        draw()


_PAGE = '<pre style="margin:0;line-height:normal;white-space:pre-wrap">{code}</pre>'


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    return Progress(*columns, console=console)


def _sink(progress: Progress, rounds: int) -> Callable[[Mapping[str, Any]], None]:
    notes = set[str]()
    jobs = defaultdict[int, Live](lambda: Live(progress, rounds, notes))
    return lambda event: jobs[event.get("job", 0)](event)
