"""``fedalt recipes``, and where the name of a recipe may stand for its file."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fedalt.cli import complete, show
from fedalt.cli.show import Json, option, print_json, say
from fedalt.errors import UserError, did_you_mean
from fedalt.files import write_text


def folder() -> Path:
    """The recipes of the package."""
    return Path(__file__).parents[1] / "recipes"


def packaged() -> dict[str, Path]:
    """Name → file: ``demo``, ``paper/figure4_rank``."""
    root = folder()
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find(text: str) -> Path | None:
    """The recipe that a name means: with or without its folder, ``recipes/`` in front, ``.yaml`` at the end."""
    known = packaged()
    name = text.removeprefix("./").removeprefix("recipes/").removesuffix(".yaml")
    short = [path for full, path in known.items() if full.rsplit("/", 1)[-1] == name]
    return known.get(name) or (short[0] if len(short) == 1 else None)


def config_path(given: Path) -> Path:
    """The file behind ``CONFIG``: a file wins over a recipe of its name."""
    if given.is_file():
        return given
    found = find(given.as_posix())
    if found is None:
        known = [*packaged(), *(name.rsplit("/", 1)[-1] for name in packaged())]
        meant = did_you_mean(given.with_suffix("").name, known)
        raise UserError(f"{given}: no such configuration file or recipe{meant or '; fedalt recipes lists ours'}")
    return found


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="print this one; all when not given", autocompletion=complete.recipes),
    ] = None,
    out: Annotated[Path | None, option("FILE", "write it there instead")] = None,
    as_json: Json = False,
) -> None:
    """List the settings that ship with fedalt; print or copy one. Their names stand for files in every command."""
    if name is None:
        if out:
            raise UserError("--out: name the recipe to write, for example fedalt recipes demo --out demo.yaml")
        about = {one: summary(path) for one, path in packaged().items()}
        print_json(about) if as_json else show.out.print(_table(about))
        return
    path = find(name)
    if path is None:
        raise UserError(f'recipe "{name}" is unknown{did_you_mean(name, packaged())}; known: {", ".join(packaged())}')
    text = path.read_text(encoding="utf-8")
    if out:
        if out.exists():
            raise UserError(f"{out}: exists already; choose another --out")
        write_text(out, text)
    if as_json:
        print_json({"name": name, "text": text, **({"out": str(out)} if out else {})})
    elif out:
        say(f"wrote {out}")
    else:
        typer.echo(text, nl=False)


def summary(path: Path) -> str:
    """The first sentence of a recipe's comments, whose first line may be a command."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# fedalt ")]
    comment = [line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("# "), lines)]
    prose = takewhile(lambda line: not line.startswith(" "), comment)
    return " ".join(prose).partition(". ")[0].rstrip(".:")


def _table(about: dict[str, str]) -> Table:
    table = Table(title="recipes", title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("what it is")
    for name, line in about.items():
        table.add_row(name, escape(line))
    return table
