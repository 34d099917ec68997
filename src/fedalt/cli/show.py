"""What a person sees: a live progress bar, tables, one-line errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedalt.config.data import planted_note
from fedalt.evaluation.metrics import metric_of, metrics_in
from fedalt.progress import on_terminal
from fedalt.report.theme import MOST, groups
from fedalt.runs.folder import RunFolder, kept

if TYPE_CHECKING:  # it imports torch, which `--help` need not wait for
    from fedalt.runs.preview import Estimate

_LONGEST, _MOST_LINES = 590, 10
"""Letters of an error line, enough for a list of names and not for a file that somebody gave as a name; and lines."""


def option(metavar: str, text: str, *flags: str, **more: Any) -> Any:
    """An option with a value; the flag is the parameter's name where none is given."""
    return typer.Option(*flags, metavar=metavar, help=text, **more)


def switch(text: str, *flags: str, **more: Any) -> Any:
    """An option without a value."""
    return typer.Option(*flags, help=text, **more)


Json = Annotated[bool, switch("print JSON on stdout, for machines", "--json")]
out = Console()
err = Console(stderr=True)


def say(line: str) -> None:
    """Print a line as it is: never wrapped, square brackets are no colours."""
    out.print(line, soft_wrap=True, highlight=False, markup=False)
    out.file.flush()  # a command that serves is read in its log


def say_notes(notes: Sequence[str]) -> None:
    """Print what was understood of rows, and other notes after it."""
    for place, note in enumerate(notes):
        say(f"note: {note}" if place else note)


def print_json(value: Any) -> None:
    """Print nothing but JSON on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def complain(message: str) -> None:
    """Print an error on stderr, one line per problem, never wrapped, none without end."""
    lines = message.splitlines()
    more = [f"… and {len(lines) - _MOST_LINES:,} more"] if len(lines) > _MOST_LINES else []
    for line in [*lines[:_MOST_LINES], *more]:
        cut = line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} … {line[3 - _LONGEST // 2 :]}"
        err.print(f"[bold red]error:[/] {escape(cut)}", soft_wrap=True, highlight=False)


def live(rounds: int) -> AbstractContextManager[Callable[[Mapping[str, Any]], None]]:
    """A progress bar on stderr for each of the enclosed runs."""
    return on_terminal(err, rounds)


def say_run(folder: RunFolder, scores: Mapping[str, Any], tasks: Mapping[str, str], as_json: bool) -> None:
    """Print a finished run: its scores under their title, and where it is."""
    if as_json:
        known = {name: value for name, value in scores.items() if name != "title"}
        print_json({"run": str(folder.path), "report": str(folder.report), **known})
        return
    out.print(run_table(scores, tasks))
    say(f"report   {folder.report}")
    say(f"run      {folder.path}")


def run_table(scores: Mapping[str, Any], tasks: Mapping[str, str]) -> Table:
    """Final scores of one run, a line per client as long as there are not too many."""
    last, best = kept(scores), scores["best_validation"]
    table = Table(title=f"{escape(scores['title'])}: scores after round {last['round']}", title_justify="left")
    table.caption = planted_note(scores["canaries"]) if scores.get("canaries") else None
    table.add_column("client")
    table.add_column("task")
    metrics = [metric_of(name) for name in metrics_in({n: 0 for values in last["clients"].values() for n in values})]
    for metric in metrics:
        table.add_column(metric.title, justify="right")
    main = metric_of(scores["metric"])
    for client in grouped(table, {c: v[main.name] for c, v in last["clients"].items()}, main.higher_is_better):
        values = last["clients"][client]
        table.add_row(client, escape(tasks.get(client, "")), *(m.text(values.get(m.name)) for m in metrics))
    table.add_section()
    count = len(last["clients"])
    columns = [(m, [v[m.name] for v in last["clients"].values() if m.name in v]) for m in metrics]
    means = (m.text(sum(values) / count) for m, values in columns)
    table.add_row("mean", f"of {count} clients" if count > MOST else "", *means, style="bold")
    for title, percent in (("worst", 0), ("10th percentile", 10)):
        table.add_row(title, "", *(m.text(m.tail(values, percent)) for m, values in columns))
    if scores["last"]["round"] != last["round"]:
        table.caption = f"the best round on validation rows; stopped after round {scores['last']['round']}"
    elif best and best["round"] != last["round"]:
        table.caption = f"best round on validation rows: {best['round']}, mean {main.title} {main.text(best['mean'])}"
    return table


def row_table(rows: list[dict[str, Any]]) -> Table:
    """Rows and tokens of every client."""
    table = Table(title="clients", title_justify="left")
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="left" if name in ("task", "category") else "right")
    for row in rows[:MOST]:
        table.add_row(*(f"{value:.1f}" if isinstance(value, float) else escape(str(value)) for value in row.values()))
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
        parts.append(f"[on {colour}]{escape(token)}[/]")
    mean = sum(value for _, value in alpha) / len(alpha)
    return "".join(parts) + f"\n[dim]mean weight of the {slot} LoRA: {mean:.2f}, of the others' {1 - mean:.2f}[/]"


def answer_table(answers: Mapping[int, str]) -> Table:
    """Several clients' answers side by side."""
    table = Table()
    for client in answers:
        table.add_column(f"client {client}", ratio=1, overflow="fold")
    table.add_row(*map(escape, answers.values()))
    return table


def grouped(table: Table, scores: Mapping[str, float], highest: bool = True) -> Iterator[str]:
    """The clients to show, with a line above each group of them."""
    for title, clients in groups(scores, highest).items():
        if title:
            table.add_section()
            table.add_row(f"[dim]{title}[/]")
        yield from clients
