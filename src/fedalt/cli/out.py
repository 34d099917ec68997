"""``fedalt push`` and ``fedalt figures``: what leaves for the hub, and for a paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import click
import typer

from fedalt.cli import complete
from fedalt.cli.show import say
from fedalt.errors import UserError, alternatives

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="run folder", autocompletion=complete.runs)]
Client = Annotated[int, typer.Option("--client", metavar="N", help="client id")]
Round = Annotated[
    Literal["best", "last"] | None,
    typer.Option("--round", help="the best round on validation rows, or the last; the one in clients/ when not given"),
]


def push(
    run: RunPath,
    client: Client,
    repo: Annotated[str, typer.Option("--repo", metavar="NAME", help="repository of the hub; made if not there")],
    *,
    merge: Annotated[bool, typer.Option("--merge", help="a whole model, and not one static LoRA")] = False,
    gguf: Annotated[
        str | None,
        typer.Option(
            "--gguf", metavar="KIND", click_type=click.Choice(("q8_0", "f16")), help="a GGUF file: q8_0 or f16"
        ),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="a new repository is for all to read")] = False,
    which: Round = None,
) -> None:
    """Send one client's model to the Hugging Face hub, with its model card; a new repository is private."""
    from fedalt.personal.export import Form
    from fedalt.personal.export import push as send

    form = Form(gguf=gguf, model=merge) if merge or gguf else None
    say(f"pushed to {send(run, client, repo, form, which=which, public=public)}")


def figures(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder, or folder of a comparison")],
    formats: Annotated[str, typer.Option("--format", metavar="NAMES", help="pdf, svg and png, with commas")] = "pdf",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="folder (default: RUN/figures)")] = None,
) -> None:
    """Write the figures of a report as files: curves, bars, heat maps."""
    from fedalt.report.paper import FORMATS, write_figures

    kinds = list(dict.fromkeys(name.strip() for name in formats.split(",")))
    if unknown := [kind for kind in kinds if kind not in FORMATS]:
        raise UserError(f"--format: {unknown[0]} is none of {alternatives(FORMATS)}")
    for path in write_figures(run, kinds, out):
        say(str(path))
