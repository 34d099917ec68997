"""``fedalt compare``: several methods, seeds and values of settings on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from fedalt.cli import complete, show
from fedalt.cli.flags import settings
from fedalt.cli.show import print_json, say
from fedalt.config import RunConfig
from fedalt.errors import UserError, did_you_mean
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
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on stdout, for machines")] = False,
) -> None:
    """Train several methods on the same rows with one base in memory, and put them side by side.

    Every method is tested against FedALT, or against the first one, over pairs of client and seed.
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
    bases, rows = Bases(), Rows()
    chosen, wanted = _methods(methods, ablations), _numbers("--seeds", seeds) or [config.seed]
    rest: Any = {"if_exists": if_exists, "jobs": jobs, "budget": _budget(match_budget), "bases": bases, "rows": rows}
    report = config.report
    with show.live(config.federation.rounds) as progress, tracked(report.trackers, out, progress, report) as sink:
        if axes:
            result = train_all(config, axes, chosen, wanted, out, **rest, sink=sink)
        else:
            result = train(config, chosen, wanted, out, **rest, sink=sink)

    def reports(out: Path, comparison: Mapping[str, Any]) -> Path:
        return write_reports(out, comparison, config.report.insight, bases, rows)

    (_show_sweep if axes else _show)(out, result, reports, as_json)


def _show(out: Path, comparison: Mapping[str, Any], reports: Reports, as_json: bool) -> None:
    from fedalt.cli.compare_tables import compare_table

    report = reports(out, comparison)
    if as_json:
        print_json({"out": str(out), "report": str(report), **comparison})
        return
    methods = comparison["methods"]
    show.out.print(compare_table(comparison))
    paths = {"report": report, **{name: block["runs"][0] for name, block in methods.items()}}
    for name, path in paths.items():
        say(f"{name:<{max(map(len, paths))}}  {path}")
    run = methods[comparison["reference"]]["runs"][0]
    client = "3" if "3" in comparison["tasks"] else next(iter(comparison["tasks"]))
    say(f"talk to client {client}: fedalt generate {run} --client {client}")


def _show_sweep(out: Path, result: Mapping[str, Any], reports: Reports, as_json: bool) -> None:
    from fedalt.cli.compare_tables import grid_table
    from fedalt.comparisons.sweep import grids
    from fedalt.files import read_json
    from fedalt.report.sweep import write_sweep_report

    written = [
        reports(out / point["name"], read_json(out / point["name"] / "comparison.json")) for point in result["points"]
    ]
    report = write_sweep_report(out, result)
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

    known = get_args(Budget)
    if text is not None and text not in known:
        raise UserError(f'--match-budget: "{text}" is unknown{did_you_mean(text, known)}; known: {", ".join(known)}')
    return text


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(flag: str, text: str | None) -> list[int]:
    try:
        return [int(part) for part in _names(text or "")]
    except ValueError:
        raise UserError(f"{flag} {text}: numbers separated by commas, for example 0,1,2") from None
