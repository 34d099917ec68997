"""Three sites of this process run a few rounds, with whatever is arranged to go wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import micro
from fedalt.config import parse_config
from fedalt.flower.certs import PublicKey
from fedalt.flower.consent import Consent
from fedalt.flower.own import SiteRows
from fedalt.flower.requests import Request
from fedalt.flower.server_app import serve
from fedalt.runs.setup import Bases
from flower.grid import LocalGrid

QUICK: dict[str, Any] = {"evaluation__every": 3}
LATE = QUICK | {"flower__round_deadline": 1.5, "flower__min_sites": 2}


def run(
    folder: Path,
    bases: Bases,
    arrange: Callable[[LocalGrid], None] = lambda grid: None,
    if_exists: Any = "ask",
    sink: Callable[[dict[str, Any]], None] = lambda event: None,
    consent: Consent | None = None,
    keys: Mapping[int, PublicKey] | None = None,
    **changes: Any,
) -> tuple[LocalGrid, list[dict[str, Any]]]:
    grid = LocalGrid(folder / "sites", range(3), bases, consent)
    arrange(grid)
    values = micro.settings(folder / "run", data__clients=3, **QUICK | changes)
    serve(grid, parse_config(values, "s").model_dump(mode="json"), if_exists, sink, keys)
    return grid, micro.events(folder / "run")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def once(client: int, round_: int, fault: str, do: str = "train") -> Callable[[int, Request], str | None]:
    """A fault that happens to one request, the first time."""
    left = iter([fault])

    def wrong(who: int, request: Request) -> str | None:
        return next(left, None) if (who, request.do, request.round) == (client, do, round_) else None

    return wrong


def failures(events: list[dict[str, Any]]) -> Iterator[tuple[int, int, str]]:
    return ((e["round"], e["client"], e["reason"]) for e in events if e["event"] == "client_failed")


def notes(events: list[dict[str, Any]]) -> list[str]:
    return [event["text"] for event in events if event["event"] == "note"]


class KilledError(Exception):
    """The server dies."""


def killed_at(moment: str, round_: int) -> Callable[[dict[str, Any]], None]:
    """A sink in which the server dies at an event of a round."""

    def sink(event: dict[str, Any]) -> None:
        if event["event"] == moment and event["round"] == round_:
            raise KilledError

    return sink


def elsewhere_trained(grid: LocalGrid) -> Any:
    other = str(micro.shared_model("llama", seed=5))
    grid.bases = Bases()
    return grid.site(1, rows=SiteRows(model=other))
