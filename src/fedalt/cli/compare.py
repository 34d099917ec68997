"""``fedalt compare``: several methods, seeds and values of settings on the same rows."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedalt.cli import complete, show
from fedalt.cli.flags import settings
from fedalt.cli.show import Json, grouped, print_json, say
from fedalt.comparisons.tables import (
    Cell,
    Grid,
    average,
    budget_grid,
    conditions,
    difference,
    finding,
    harmed,
    score_grid,
    seeds,
    verdict_grid,
    who,
)
from fedalt.config import RunConfig
from fedalt.errors import UserError, choose, shortened
from fedalt.evaluation.metrics import Metric, metric_of
from fedalt.runs.folder import IfExists

_METHODS = "local,fedit,fedalt"
Reports = Callable[[Path, Mapping[str, Any]], Path]
"""Writes the reports of a comparison."""


@settings("method", "seed")
def compare(
    config: RunConfig,
    if_exists: IfExists,
    *,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help=f"methods and variants, separated by commas (default: {_METHODS})",
            autocompletion=complete.listed(complete.methods),
        ),
    ] = None,
    ablations: Annotated[bool, typer.Option("--ablations", help="FedALT with one part changed at a time")] = False,
    seeds: Annotated[
        str | None, typer.Option(metavar="NUMBERS", help="separated by commas (default: the settings' seed)")
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="processes that share the runs; each holds a base of its own in memory"),
    ] = 1,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUES",
            help="one comparison per value, into OUT/KEY=VALUE, for example lora.r=4,6,8 (lora.alpha stays); "
            "repeatable, for every combination",
        ),
    ] = None,
    heterogeneity: Annotated[
        str | None,
        typer.Option(metavar="NUMBERS", help="the same as --sweep data.tasks_per_client=NUMBERS"),
    ] = None,
    match_budget: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="choose each method's rank for the same budget per client: parameters or bytes",
            autocompletion=lambda incomplete: iter(("parameters", "bytes")),
        ),
    ] = None,
    partitions: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="draw rows, or deal them, N times, each with every seed (default: every seed draws its own)",
        ),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            help="differences below this do not matter (default: 1 where scores run from 0 to 100, otherwise none)",
        ),
    ] = None,
    tune: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="first N trials per method on validation rows: learning rate and the method's own settings",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train several methods on the same rows with one base in memory, and put them side by side.

    Every method is tested against FedALT, or against the first one, over clients.
    """
    from fedalt.comparisons.compare import compare as train
    from fedalt.comparisons.sweep import parse_axis
    from fedalt.comparisons.sweep import sweep as train_all
    from fedalt.data.load import Rows
    from fedalt.report.html import write_reports
    from fedalt.runs.setup import Bases
    from fedalt.runs.trackers import check_trackers, tracked

    check_trackers(config.report.trackers)
    if config.report.trackers and (sweep or heterogeneity):
        raise UserError("report.trackers: not with --sweep or --heterogeneity, whose runs have the same names")
    out = Path(config.out or "runs/comparison")
    axes = [parse_axis(text) for text in sweep or ()]
    if heterogeneity is not None:
        axes.append(("data.tasks_per_client", _at_least_one("--heterogeneity", heterogeneity)))
    if tune and axes:
        raise UserError("--tune: not with --sweep or --heterogeneity")
    bases, rows = Bases(), Rows()
    chosen, wanted = _methods(methods, ablations), _numbers("--seeds", seeds) or [config.seed]
    rest: Any = {"if_exists": if_exists, "jobs": jobs, "budget": _budget(match_budget), "bases": bases, "rows": rows}
    rest |= {"partitions": partitions, "margin": margin}
    report = config.report
    with show.live(config.federation.rounds) as progress, tracked(report.trackers, out, progress, report) as sink:
        if axes:
            result = train_all(config, axes, chosen, wanted, out, **rest, sink=sink)
        else:
            result = train(config, chosen, wanted, out, **rest, tune=tune, sink=sink)

    def reports(out: Path, comparison: Mapping[str, Any]) -> Path:
        told = {**comparison, "command": shlex.join(["fedalt", *sys.argv[1:]])}
        return write_reports(out, told, config.report.insight, bases, rows)

    (_show_sweep if axes else _show)(out, result, reports, as_json)


def _show(out: Path, comparison: Mapping[str, Any], reports: Reports, as_json: bool) -> None:
    report = reports(out, comparison)
    if as_json:
        print_json({"out": str(out), "report": str(report), **comparison})
        return
    methods = comparison["methods"]
    show.out.print(compare_table(comparison))
    for line in who(comparison):
        say(line)
    paths = {"report": report, **{name: block["runs"][0] for name, block in methods.items()}}
    for name, path in paths.items():
        say(f"{name:<{max(map(len, paths))}}  {path}")
    run = methods[comparison["reference"]]["runs"][0]
    client = "3" if "3" in comparison["tasks"] else next(iter(comparison["tasks"]))
    say(f"talk to client {client}: fedalt generate {run} --client {client}")


def _show_sweep(out: Path, result: Mapping[str, Any], reports: Reports, as_json: bool) -> None:
    from fedalt.comparisons.sweep import grids
    from fedalt.report.html import write_sweep_reports

    report, written = write_sweep_reports(out, result, reports)
    if as_json:
        print_json({"out": str(out), "report": str(report), "reports": [str(path) for path in written], **result})
        return
    for grid in grids(result):
        show.out.print(grid_table(grid))
        show.out.print()
    say(f"table    {out / 'sweep.md'}")
    for path in (report, *written):
        say(f"report   {path}")


def _methods(text: str | None, ablations: bool) -> list[str]:
    from fedalt.methods.fedalt_variants import ABLATIONS

    given = _names(_METHODS if text is None and not ablations else text or "")
    return [*given, *(ABLATIONS if ablations else ())]


def _at_least_one(flag: str, text: str) -> list[int]:
    values = _numbers(flag, text)
    if not values or min(values) < 1:
        raise UserError(f"{flag} {text}: numbers from 1, separated by commas, for example 1,2,4")
    return values


def _budget(text: str | None) -> str | None:
    from fedalt.comparisons.jobs import Budget

    return None if text is None else choose("--match-budget", text, get_args(Budget))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(flag: str, text: str | None) -> list[int]:
    try:
        found = [int(part) for part in _names(text or "")]
        if text is not None and not found:
            raise ValueError
        return found
    except ValueError:
        raise UserError(f"{flag} {shortened(text or '')}: numbers separated by commas, for example 0,1,2") from None


_FEW = 4
"""Methods that fit beside each other."""
_TASKS = 10
"""Columns of tasks that fit, when methods are rows."""
_LINES = box.Box("    \n    \n ── \n    \n ── \n    \n    \n    \n")
"""A line under the heading and one above what is below."""
_NAME = 6
"""Letters of a task's name that fit above its scores."""


def compare_table(comparison: Mapping[str, Any]) -> Group:
    """Clients × methods for a few methods; methods × tasks, and a second table with tests and cost, for more."""
    if len(comparison["methods"]) <= _FEW and not comparison["below"]:
        return _by_client(comparison)
    scores = score_grid(comparison, _TASKS, judged=False)
    rest = (part for grid in (verdict_grid(comparison), budget_grid(comparison)) for part in (Text(), _brief(grid)))
    return Group(Text(finding(comparison)), grid_table(scores, _short(scores.head)), *rest)


def grid_table(grid: Grid, head: Sequence[str] | None = None, gap: int = 1) -> Group:
    """A grid as wide as its cells, the best of every column in green."""
    table = Table(title=escape(grid.title), title_justify="left", box=_LINES, pad_edge=False, padding=(0, gap, 0, 0))
    for i, name in enumerate(head or grid.head):
        table.add_column(escape(name), justify="right" if i else "left", vertical="bottom", no_wrap=i == 0)
    best = grid.best
    for row in grid.rows:
        table.add_row(*(_cell(cell, top) for cell, top in zip(row, best, strict=True)))
    if grid.below:
        table.add_section()
        for row in grid.below:
            table.add_row(*(_cell(cell, None) for cell in row), style="dim")
    return Group(table, *(Text(note, style="dim") for note in grid.notes))


def _brief(grid: Grid) -> Group:
    """A grid under headings of two lines."""
    heads = ["\n".join(head.replace(", ", " ").rsplit(" ", 1)) for head in grid.head]
    return grid_table(grid, heads)


def _by_client(comparison: Mapping[str, Any]) -> Group:
    methods, tasks = comparison["methods"], comparison["tasks"]
    blocks, constant = list(methods.values()), comparison["majority"]
    metric = metric_of(comparison["metric"])
    title = f"{metric.title} on each client's own test rows, {seeds(comparison)}"
    table = Table(title=title, title_justify="left")
    table.add_column("client")
    table.add_column("task")
    for block in [*blocks, *([constant] if constant else [])]:
        table.add_column(escape(block["title"]), justify="right", style="dim" if block is constant else None)
    clients = {c: [block["per_client"][c] for block in blocks] for c in tasks}
    for client in grouped(table, {c: sum(values) for c, values in clients.items()}, metric.higher_is_better):
        last = [metric.text(constant["per_client"][client])] if constant else []
        table.add_row(client, escape(tasks[client]), *_mark_best(clients[client], metric), *last)
    blocks += [constant] if constant else []
    table.add_section()
    table.add_row("mean", "", *(average(block, metric).text for block in blocks), style="bold")
    table.add_row("worst client", "", *(metric.text(block["worst"]) for block in blocks))
    table.add_row("10th percentile", "", *(metric.text(block["p10"]) for block in blocks))
    if "local" in methods:
        table.add_row("gain over Local", "", *(metric.text(b["gain_over_local"], sign=True) for b in blocks))
        table.add_row("clients harmed", "", *(harmed(block, len(tasks)) for block in blocks))
    blocks = list(methods.values())
    if len(methods) > 1:
        apart, p, verdict = zip(*(difference(block, metric) for block in blocks), strict=True)
        table.add_section()
        table.add_row(f"vs {escape(methods[comparison['reference']]['title'])}", "", *apart)
        table.add_row("p (Holm)", "", *p)
        table.add_row("verdict", "", *verdict)
    table.add_section()
    table.add_row("steps", "", *(f"{b['steps']:,.0f}" for b in blocks))
    table.add_row("tokens, k", "", *(f"{b['tokens'] / 1e3:,.0f}" for b in blocks))
    table.add_row("trained, k", "", *(f"{b['parameters'] / 1e3:,.0f}" for b in blocks))
    table.add_row("sent, MB", "", *(f"{(b['bytes_up'] + b['bytes_down']) / 1e6:.1f}" for b in blocks))
    table.add_row("training, s", "", *(f"{b['seconds']:.0f}" for b in blocks))
    notes = conditions(comparison)
    notes += verdict_grid(comparison).notes if len(methods) > 1 else []
    notes = list(dict.fromkeys(notes))
    return Group(Text(finding(comparison)), table, *(Text(note, style="dim") for note in notes))


def _short(head: Any) -> list[str]:
    """Names of tasks without a prefix that all share, cut to a few letters where they stay different."""
    first, *names, last = head
    prefix = names[0].split("_")[0] + "_" if names else ""
    if len(names) > 1 and all(name.startswith(prefix) and name != prefix for name in names):
        names = [name.removeprefix(prefix) for name in names]
    cut = [name if len(name) <= _NAME else name[: _NAME - 1] + "." for name in names]
    return [first, *(cut if len(set(cut)) == len(cut) else names), last]


def _cell(cell: Cell, top: float | None) -> str:
    if isinstance(cell, str):
        return escape(cell)
    return f"[green]{cell.text}[/]" if cell.value == top else cell.text


def _mark_best(values: list[float], metric: Metric) -> list[str]:
    best = metric.best(values)
    return [f"[green]{metric.text(value)}[/]" if value == best else metric.text(value) for value in values]
