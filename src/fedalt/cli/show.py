"""What a person sees: a live progress bar, tables, one-line errors."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fedalt.evaluation.metrics import Metric, metric_of, metrics_in
from fedalt.report.shown import MOST, groups

if TYPE_CHECKING:  # it imports torch, which `--help` need not wait for
    from fedalt.experiment.estimate import Estimate

out = Console()
err = Console(stderr=True)


def say(line: str) -> None:
    """Print a line as it is: never wrapped, square brackets are no colours."""
    out.print(line, soft_wrap=True, highlight=False, markup=False)


def print_json(value: Any) -> None:
    """Print nothing but JSON on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def complain(message: str) -> None:
    """Print an error on stderr, one line per problem, never wrapped."""
    for line in message.splitlines():
        err.print(f"[bold red]error:[/] {_plain(line)}", soft_wrap=True, highlight=False)


class Live:
    """Turns the events of one run after another into a progress bar on stderr.

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
        self.progress.console.print(f"[bold]{_plain(event['name'])}[/]", soft_wrap=True, highlight=False)

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
        self.loss = f", loss {event['loss']:.3f}"
        self._update(event["round"] - 0.05, f"round {event['round']}/{self.rounds}{self.loss}")

    def _on_evaluated(self, event: Mapping[str, Any]) -> None:
        self._update(event["round"], f"scored in {event['seconds']:.0f} s{self.loss}")

    def _on_run_finished(self, event: Mapping[str, Any]) -> None:
        self._update(self.rounds, f"mean {self.metric.text(event['mean'])}, worst {self.metric.text(event['worst'])}")

    def _on_client_failed(self, event: Mapping[str, Any]) -> None:
        self.progress.console.print(
            f"[yellow]client {event['client']} set aside in round {event['round']}:[/] {_plain(event['reason'])}"
        )

    def _on_note(self, event: Mapping[str, Any]) -> None:
        if event["text"] not in self.notes:  # once for all runs of a comparison
            self.notes.add(event["text"])
            self.progress.console.print(f"[dim]note: {_plain(event['text'])}[/]", soft_wrap=True)

    def _update(self, completed: float, state: str) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=completed, state=state)


@contextmanager
def live(rounds: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A progress bar for each of the enclosed runs, whichever job of a comparison they come from."""
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    notes = set[str]()
    with Progress(*columns, console=err) as progress:
        jobs = defaultdict[int, Live](lambda: Live(progress, rounds, notes))
        yield lambda event: jobs[event.get("job", 0)](event)


def run_table(scores: Mapping[str, Any], tasks: Mapping[str, str]) -> Table:
    """Final scores of one run, a line per client as long as there are not too many."""
    last, best = scores["last"], scores["best_validation"]
    table = Table(title=f"{_plain(scores['title'])}: scores after round {last['round']}", title_justify="left")
    table.add_column("client")
    table.add_column("task")
    metrics = [metric_of(name) for name in metrics_in({n: 0 for values in last["clients"].values() for n in values})]
    for metric in metrics:
        table.add_column(metric.title, justify="right")
    main = metric_of(scores["metric"])
    for client in grouped(table, {c: v[main.name] for c, v in last["clients"].items()}, main.higher_is_better):
        values = last["clients"][client]
        table.add_row(client, _plain(tasks.get(client, "")), *(m.text(values.get(m.name)) for m in metrics))
    table.add_section()
    count = len(last["clients"])
    columns = [(m, [v[m.name] for v in last["clients"].values() if m.name in v]) for m in metrics]
    means = (m.text(sum(values) / count) for m, values in columns)
    table.add_row("mean", f"of {count} clients" if count > MOST else "", *means, style="bold")
    for title, percent in (("worst", 0), ("10th percentile", 10)):
        table.add_row(title, "", *(m.text(m.tail(values, percent)) for m, values in columns))
    if best and best["round"] != last["round"]:
        table.caption = f"best round on validation rows: {best['round']}, mean {main.title} {main.text(best['mean'])}"
    return table


def row_table(rows: list[dict[str, Any]]) -> Table:
    """Rows and tokens of every client."""
    table = Table(title="clients", title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if name in ("task", "category") else "right")
    for row in rows[:MOST]:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else _plain(str(value)) for value in row.values()))
    if len(rows) > MOST:
        table.caption = f"the first {MOST} of {len(rows)} clients"
    return table


def estimate_lines(cost: Estimate, rounds: int) -> str:
    """What a run will take."""
    memory = ", ".join(f"{name} {value / 1e9:.2f} GB" for name, value in cost.peak_memory.items())
    return (
        f"training  {cost.steps} steps of {cost.seconds_per_step:.2f} s, about {cost.seconds / 60:.1f} minutes "
        f"in {rounds} rounds, {cost.cohort} clients at a time\n"
        f"scoring   up to about {cost.scoring_seconds / 60:.1f} minutes in all\n"
        f"memory    {memory} at the largest step and the longest prompts\n"
        f"uploads   {cost.bytes_up / 1e6:.2f} MB a round, all clients together"
    )


def alpha_line(alpha: list[tuple[str, float]], slot: str) -> str:
    """Tokens with the mean weight of a slot below 0.5 in blue and above in green, the further the brighter."""
    parts = []
    for token, value in alpha:
        strength = int(min(abs(value - 0.5) * 4, 1) * 175)
        colour = f"rgb({80 - strength // 3},{80 + strength},{80})" if value >= 0.5 else f"rgb(80,80,{80 + strength})"
        parts.append(f"[on {colour}]{_plain(token)}[/]")
    mean = sum(value for _, value in alpha) / len(alpha)
    return "".join(parts) + f"\n[dim]mean weight of the {slot} LoRA: {mean:.2f}, of the others' {1 - mean:.2f}[/]"


def grouped(table: Table, scores: Mapping[str, float], highest: bool = True) -> Iterator[str]:
    """The clients to show, with a line above each group of them."""
    for title, clients in groups(scores, highest).items():
        if title:
            table.add_section()
            table.add_row(f"[dim]{title}[/]")
        yield from clients


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
