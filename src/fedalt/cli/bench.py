"""``fedalt bench``: measure fedalt against another way to do the same work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fedalt.benchmarks.task import WHATS, Spec, pair
from fedalt.cli import show
from fedalt.cli.show import Json, option
from fedalt.errors import UserError, choose

_WHAT = ", ".join(WHATS)
_AGAINST = "; ".join(f"{name}: {', '.join(what.opponents)}" for name, what in WHATS.items())
_DTYPES = ("float32", "bfloat16")


def bench(
    *,
    what: Annotated[str, typer.Argument(metavar="[WHAT]", help=f"one of: {_WHAT}")] = "round",
    against: Annotated[str | None, option("NAME", f"opponent; the first is the default ({_AGAINST})")] = None,
    model: Annotated[
        str | None, option("NAME", "llama-25m, bloom-560m, gpt2-small, llama-7b (random weights), tiny, or a folder")
    ] = None,
    data: Annotated[str, option("DATA", "tinyworld, or a folder of client files")] = "tinyworld",
    clients: Annotated[str | None, option("NUMBERS", "clients; a list such as 1,2,4 gives a line each")] = None,
    rows: Annotated[int | None, option("N", "rows per client; evaluation: prompts per client", min=1)] = None,
    batch_size: Annotated[int, option("N", "rows per client and step", min=1)] = 8,
    dtype: Annotated[str, option("DTYPE", " or ".join(_DTYPES))] = "float32",
    dropout: Annotated[float, option("X", "0 makes losses of both sides equal", min=0, max=0.99)] = 0.05,
    executor: Annotated[str, option("NAME", "fedalt's own: stacked or loop (round only)")] = "stacked",
    cohort: Annotated[int | None, option("N", "clients that fedalt stacks at a time", min=1)] = None,
    num_beams: Annotated[int, option("N", "evaluation: 1 is greedy", min=1)] = 1,
    max_new_tokens: Annotated[int, option("N", "evaluation: longest answer", min=1)] = 32,
    parameters: Annotated[
        int | None, option("N", "aggregation: parameters of an upload, at least; the rank follows", min=1)
    ] = None,
    repeats: Annotated[int, option("N", "runs of each side", min=1)] = 5,
    threads: Annotated[int | None, option("N", "threads of torch; its own choice when not given", min=1)] = None,
    seed: Annotated[int, option("N", "of weights, adapters and row order", min=0)] = 0,
    out: Annotated[Path | None, option("FILE", "write everything that was measured into this JSON file")] = None,
    as_json: Json = False,
) -> None:
    """Measure fedalt against another way to do the same work: by turns, in processes of their own.

    WHAT is one of round, step, evaluation, aggregation, clients, memory, start.
    """
    from fedalt.benchmarks import bench as by_turns
    from fedalt.benchmarks import workload
    from fedalt.benchmarks.bench import describe
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
        parameters=parameters,
        seed=seed,
    )
    workload.check(settings.model)
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
    """Both sides and their ratio, for every number of clients."""
    spec = result["lines"][0]["a"]["spec"]
    title = f"{result['what']}, {spec['model']}, batch {spec['batch_size']}, {spec['dtype']}"
    caption = f"seconds for {result['unit']}: median of {result['repeats']} runs of each side, by turns; memory: peak"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for name in ("clients", "side"):
        table.add_column(name)
    for name in ("seconds", "min–max", "tokens/s", "memory", "check"):
        table.add_column(name, justify="right")
    for line in result["lines"]:
        for side in "ab":
            measured = line[side]
            mark = " (extrapolated)" if measured["extrapolated"] else ""
            name = measured["spec"]["side"] + mark
            table.add_row(str(measured["spec"]["clients"]), name, *_cells(measured), _check(line["agreement"], side))
        table.add_row(*_ratio_row(line), style="bold", end_section=True)
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
        listed = ", ".join(name for name, chosen in WHATS.items() if chosen.many)
        raise UserError(f"--clients {text}: {what} takes one number; a list goes with {listed}")
    if WHATS[what].clients == 1 and numbers != [1]:
        raise UserError(f"--clients {text}: {what} is about one client")
    return numbers


def _progress(side: str, repeat: int, run: Mapping[str, Any]) -> None:
    show.err.print(f"[dim]run {repeat + 1}, {side}: {run['seconds']:.3g} s[/]", highlight=False)


def _cells(side: Mapping[str, Any]) -> tuple[str, str, str, str]:
    seconds, speed = side["seconds"], side["tokens_per_second"]
    memory = [(name if name != "process" else "", value["median"] / 1e9) for name, value in side["memory"].items()]
    return (
        f"{seconds['median']:.3g}",
        f"{seconds['min']:.3g}–{seconds['max']:.3g}",
        f"{speed['median']:,.0f}" if speed else "",
        ", ".join(f"{name} {value:.2f} GB".strip() for name, value in memory),
    )


def _ratio_row(line: Mapping[str, Any]) -> tuple[str, ...]:
    pairs, found = line["ratio"]["pairwise"], line["agreement"]
    apart = found.get("largest_relative_difference")
    answers = found.get("answers")
    return (
        "",
        f"{line['b']['spec']['side']} / {line['a']['spec']['side']}",
        f"×{line['ratio']['of_medians']:.2f}",
        f"pairs ×{pairs['median']:.2f}",
        "",
        ", ".join(f"×{value:.2f}" for value in line["memory_ratio"].values()),
        f"{answers['same']} of {answers['of']} the same" if answers else "" if apart is None else f"{apart:.1g} apart",
    )


def _check(found: Mapping[str, Any], side: str) -> str:
    """Mean loss, or norm of the rows, that both sides should have."""
    return f"{found['values'][side]:.5g}" if "values" in found else ""


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
