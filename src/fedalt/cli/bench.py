"""``fedalt bench``: measure fedalt against another way to do the same work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedalt.benchmarks.task import WHATS, Spec, choose, pair
from fedalt.cli import show
from fedalt.errors import UserError

_WHAT = ", ".join(WHATS)
_AGAINST = "; ".join(f"{name}: {', '.join(what.opponents)}" for name, what in WHATS.items())
_DTYPES = ("float32", "bfloat16")


def bench(
    what: Annotated[str, typer.Argument(metavar="[WHAT]", help=_WHAT)] = "round",
    against: Annotated[str | None, typer.Option(help=f"opponent; the first is the default ({_AGAINST})")] = None,
    model: Annotated[
        str | None, typer.Option(help="llama-25m, bloom-560m, gpt2-small, llama-7b (random weights), tiny, or a folder")
    ] = None,
    data: Annotated[str, typer.Option(help="tinyworld, or a folder of client files")] = "tinyworld",
    clients: Annotated[str | None, typer.Option(help="clients; a list such as 1,2,4 gives a line each")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="rows per client; evaluation: prompts per client")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="rows per client and step")] = 8,
    dtype: Annotated[str, typer.Option(help=" or ".join(_DTYPES))] = "float32",
    dropout: Annotated[float, typer.Option(min=0, max=0.99, help="0 makes losses of both sides equal")] = 0.05,
    executor: Annotated[str, typer.Option(help="fedalt's own: stacked or loop (round only)")] = "stacked",
    cohort: Annotated[int | None, typer.Option(min=1, help="clients that fedalt stacks at a time")] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="evaluation: 1 is greedy")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="evaluation: longest answer")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="runs of each side")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of torch; its own choice when not given")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of weights, adapters and row order")] = 0,
    out: Annotated[Path | None, typer.Option(help="write everything that was measured into this JSON file")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on stdout, for machines")] = False,
) -> None:
    """Measure fedalt against another way to do the same work: by turns, in processes of their own."""
    from fedalt.benchmarks import bench as by_turns
    from fedalt.benchmarks.machine import describe
    from fedalt.files import write_json

    chosen = WHATS[choose("WHAT", what, WHATS)]
    settings = Spec(
        what=what,
        model=model or chosen.model,
        data=data,
        rows=rows or chosen.rows,
        batch_size=batch_size,
        dtype=choose("--dtype", dtype, _DTYPES),  # type: ignore[arg-type]
        threads=threads,
        cohort=cohort,
        dropout=dropout,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        seed=seed,
    )
    loop = choose("--executor", executor, ("stacked", "loop")) == "loop"
    pairs = [pair(replace(settings, clients=k), against, loop) for k in _clients(what, clients)]
    machine = describe()
    lines = [by_turns.compare(a, b, repeats, by_turns.run_worker, _progress) for a, b in pairs]
    machine["threads"] = lines[0]["a"]["runs"][0]["threads"]
    result = {"what": what, "unit": chosen.unit, "repeats": repeats, "machine": machine, "lines": lines}
    if out:
        write_json(out, result)
    if as_json:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False))
        return
    show.out.print(table(result))
    show.out.print(_machine_line(machine), highlight=False, markup=False)


def table(result: Mapping[str, Any]) -> Table:
    """A line per number of clients."""
    a, b = (result["lines"][0][side]["spec"]["side"] for side in "ab")
    spec, times = result["lines"][0]["a"]["spec"], result["repeats"]
    title = (
        f"{result['what']}: seconds for {result['unit']}, {spec['model']}, batch {spec['batch_size']}, {spec['dtype']}"
    )
    table = Table(
        title=title, title_justify="left", caption=f"median (smallest–largest) of {times} runs each, by turns"
    )
    for name in ("clients", f"{a}, s", f"{b}, s", "ratio", "by pairs", f"{a}, GB", f"{b}, GB", "same work"):
        table.add_column(name, justify="right")
    for line in result["lines"]:
        table.add_row(
            str(line["clients"]),
            *(_seconds(line[side]) for side in "ab"),
            f"×{line['ratio']['of_medians']:.2f}",
            f"×{line['ratio']['pairwise']['median']:.2f}",
            *(_memory(line[side]) for side in "ab"),
            _agreement(line["agreement"]),
        )
    return table


def _clients(what: str, text: str | None) -> list[int]:
    if text is None:
        return [WHATS[what].clients]
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"--clients {text}: a number from 1, or several separated by commas, for example 1,2,4,8")
    if len(numbers) > 1 and not WHATS[what].many:
        listed = " and ".join(name for name, chosen in WHATS.items() if chosen.many)
        raise UserError(f"--clients {text}: {what} takes one number; a list goes with {listed}")
    if WHATS[what].clients == 1 and numbers != [1]:
        raise UserError(f"--clients {text}: {what} is about one client")
    return numbers


def _progress(side: str, repeat: int, run: Mapping[str, Any]) -> None:
    show.err.print(f"[dim]run {repeat + 1}, {side}: {run['seconds']:.3g} s[/]", highlight=False)


def _seconds(side: Mapping[str, Any]) -> str:
    seconds = side["seconds"]
    mark = " extrapolated" if side["extrapolated"] else ""
    return f"{seconds['median']:.3g} ({seconds['min']:.3g}–{seconds['max']:.3g}){mark}"


def _memory(side: Mapping[str, Any]) -> str:
    parts = [
        f"{value['median'] / 1e9:.2f}{'' if name == 'process' else ' ' + name}"
        for name, value in side["memory"].items()
    ]
    return ", ".join(parts)


def _agreement(found: Mapping[str, Any]) -> str:
    parts = []
    if "values" in found:
        parts.append(f"{found['values']['a']:.5g} and {found['values']['b']:.5g}")
    if "answers" in found:
        parts.append(f"{found['answers']['same']} of {found['answers']['of']} answers")
    return ", ".join(parts) or "–"


def _machine_line(machine: Mapping[str, Any]) -> str:
    parts = [
        machine["cpu"],
        *([machine["gpu"]] if machine["gpu"] else []),
        f"{machine['cores']} cores",
        f"{machine['threads']} threads",
        f"{machine['memory'] / 1e9:.0f} GB",
        f"torch {machine['versions']['torch']}",
        f"commit {(machine['commit'] or 'unknown')[:12]}",
    ]
    return ", ".join(parts)
