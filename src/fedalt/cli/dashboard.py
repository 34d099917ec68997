"""``fedalt dashboard``: runs in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedalt.cli.show import option, say
from fedalt.errors import needs


def dashboard(
    runs: Annotated[Path, typer.Argument(metavar="[RUNS_DIR]", help="folder of runs and comparisons")] = Path("runs"),
    port: Annotated[int, option("N", "on 127.0.0.1; 0 for any that is free", min=0, max=65535)] = 8501,
) -> None:
    """Watch, start, stop and compare runs in a browser on this machine, and talk to their clients; until Ctrl-C."""
    with needs("dashboard", "dashboards"):
        from fedalt.dashboard.serve import serve

    if runs == Path("runs"):
        runs.mkdir(exist_ok=True)
    say(f"the runs in {runs}, for this machine's browsers; whoever has the address may do what you may do here:")
    serve(runs, port, lambda address: say(f"  {address}"))
