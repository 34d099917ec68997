"""``fedalt partition``: who would get which rows, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedalt.cli import show
from fedalt.cli.flags import settings
from fedalt.cli.show import print_json, say
from fedalt.config import RunConfig

_NOT_ROWS = ["model", "method", "rounds", "epochs", "batch_size", "lr", "rank", "targets", "dtype", "out", "devices"]


@settings(*_NOT_ROWS, starts=False)
def partition(
    config: RunConfig,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="folder for partition.json and partition.html, one file without network"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on stdout, for machines")] = False,
) -> None:
    """Deal the rows to clients and show who gets what: labels by client, as table and picture."""
    from fedalt.data.load import load_both
    from fedalt.data.record import record

    taken, held_out = load_both(config.data, config.seed)
    written = record(config.data, config.seed, taken, held_out)
    paths = _write(out, written) if out else {}
    if as_json:
        shown = {name: value for name, value in written.items() if name not in ("digest", "clients", "held_out")}
        clients = {"clients": list(taken.ids), "held_out": list(held_out.ids)}
        print_json({**shown, **clients, "notes": taken.notes, **{name: str(path) for name, path in paths.items()}})
        return
    show.say_notes(taken.notes)
    show.out.print(_table(written))
    for name, path in paths.items():
        say(f"{name:<9} {path}")


def _write(out: Path, written: dict[str, Any]) -> dict[str, Path]:
    from fedalt.files import write_json
    from fedalt.report.partition import write_page

    write_json(out / "partition.json", written)
    return {"partition": out / "partition.json", "picture": write_page(out / "partition.html", written)}


def _table(written: dict[str, Any]) -> Any:
    from fedalt.cli.partition_table import partition_table

    return partition_table(written, show.out.width)
