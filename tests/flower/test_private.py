"""Private steps at sites: the numbers of one machine, nothing but what is agreed leaves, no round is sent twice."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import micro
from fedalt.config import parse_config
from fedalt.federation.client import SPENT
from fedalt.flower.own import SiteRows
from fedalt.flower.requests import CODES, Request, Trained
from fedalt.flower.server_app import serve
from fedalt.flower.site import Site
from fedalt.runs import folder as run_folder
from fedalt.runs.setup import Bases
from fedalt.training.privacy import epsilon
from flower.grid import LocalGrid

pytestmark = pytest.mark.usefixtures("clock")
PRIVATE: dict[str, Any] = {
    "privacy__epsilon": 5.0,
    "data__clients": 3,
    "federation__executor": "loop",
    "federation__rounds": 2,
    "training__local_epochs": 1,
    "evaluation__every": 2,
    "evaluation__max_new_tokens": 2,
}


@pytest.fixture(scope="module")
def bases() -> Bases:
    return Bases()


@pytest.fixture
def known_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "token_bytes", lambda size: bytes(range(size)))


def far(
    out: Path, bases: Bases, arrange: Callable[[LocalGrid], None] = lambda grid: None, **changes: Any
) -> tuple[LocalGrid, list[dict[str, Any]]]:
    values = micro.settings(out, **{**PRIVATE, **changes})
    grid = LocalGrid(out.with_name(f"{out.name}-sites"), range(3), bases)
    arrange(grid)
    seen: list[dict[str, Any]] = []
    serve(grid, parse_config(values, "s").model_dump(mode="json"), "ask", seen.append)  # type: ignore[arg-type]
    return grid, seen


def told(grid: LocalGrid) -> list[Trained]:
    return [reply.body for _, _, reply in grid.sent if isinstance(reply.body, Trained)]


def clients(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "client"]


def test_sites_and_one_machine_have_the_same_numbers(tmp_path: Path, bases: Bases, known_key: None) -> None:
    grid, seen = far(tmp_path / "far", bases)
    micro.run_here(micro.settings(tmp_path / "near", **PRIVATE))
    one, other = grid.models(), micro.adapters(tmp_path / "near")
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
    near = micro.of_kind(tmp_path / "near", "client")
    assert [event["epsilon"] for event in clients(seen)] == [event["epsilon"] for event in near]
    assert all(event["loss"] is None and event["tokens"] == 0 and event["alpha"] == [] for event in clients(seen))
    assert all(event["loss"] > 0 for event in near), "nothing leaves one machine"
    assert all(body.loss is None and not body.alpha and not body.tokens for body in told(grid))
    assert [event["loss"] for event in seen if event["event"] == "round"] == [None, None]
    assert not list((tmp_path / "far-sites").rglob("privacy.key")), "gone with the end of the run"


def test_everything_is_told_where_that_is_agreed(tmp_path: Path, bases: Bases) -> None:
    grid, _ = far(tmp_path / "far", bases, privacy__report="all")
    assert all(body.loss and body.tokens for body in told(grid))


def test_no_score_is_told_where_none_is_agreed(tmp_path: Path, bases: Bases) -> None:
    grid, seen = far(tmp_path / "far", bases, privacy__report="none")
    assert not any(event["event"] == "scores" for event in seen) and not any(
        asked.do == "score" for _, asked in grid.seen
    )
    asked = next(asked for client, asked in grid.seen if asked.do == "save" and client == 0)
    assert CODES["unreported"] in grid.sites[0].answer(replace(asked, do="score")).why, (
        "if the server asks all the same"
    )
    scores = json.loads((tmp_path / "far/results/final_scores.json").read_text())
    assert scores["last"] == {"round": 2, "mean": None, "worst": None, "p10": None, "clients": {}}
    assert (tmp_path / "far/report.html").is_file()


def test_a_round_that_was_sent_and_lost_is_not_sent_again(tmp_path: Path, bases: Bases) -> None:
    def lose(grid: LocalGrid) -> None:
        def fault(client: int, request: Request) -> None:
            if (client, request.do, request.round) == (1, "train", 3):
                [run] = (path for path in (grid.folder / "1").iterdir() if path.is_dir())
                assert stat.S_IMODE((run / "privacy.key").stat().st_mode) == 0o600
                shutil.rmtree(run / "checkpoints/round_0002", ignore_errors=True)
                grid.restart(1)

        grid.fault = fault

    _, seen = far(tmp_path / "far", bases, lose, federation__rounds=3, evaluation__every=3)
    failed = [event for event in seen if event["event"] == "client_failed" and "sent round 2" in event["reason"]]
    assert [(event["client"], event["round"]) for event in failed] == [(1, 3)]
    assert [event["round"] for event in clients(seen) if event["client"] == 1] == [1, 2]


def test_sites_stop_by_their_own_account(tmp_path: Path, bases: Bases) -> None:
    budget = 1.001 * epsilon(4 / 12, 1.0, 3, 1 / 12)
    grid, seen = far(tmp_path / "far", bases, privacy__epsilon=budget, privacy__noise_multiplier=1.0)
    assert {event["round"] for event in clients(seen)} == {1} and CODES["budget"] == SPENT
    assert any("privacy.epsilon is spent" in event["text"] for event in seen if event["event"] == "note")
    assert {body.epsilon for body in told(grid)} == {epsilon(4 / 12, 1.0, 3, 1 / 12)}


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({}, True),
        ({"privacy__epsilon": 6.0}, False),
        ({"privacy__epsilon": None}, False),
        ({"privacy__epsilon": None, "privacy__noise_multiplier": 3.0}, False),
        ({"privacy__report": "all"}, False),
        ({"privacy__delta": 0.5}, False),
        ({"privacy__delta": 0.01}, True),
    ],
)
def test_a_site_with_a_limit_of_its_own_takes_part_within_it_only(
    changes: dict[str, Any], fits: bool, tmp_path: Path, bases: Bases
) -> None:
    values = micro.settings(tmp_path / "x", **{**PRIVATE, **changes})
    settings = json.dumps(parse_config(values, "s").model_dump(mode="json"))
    rows = SiteRows(data=values["data"]["source"], model=values["model"]["name"], epsilon=5.0, min_rows=1)
    reply = Site(0, tmp_path / "state", bases, rows).answer(Request("join", "run-1", settings=settings, clients=3))
    assert bool(reply.body) == fits and (fits or reply.why.endswith(CODES["epsilon"]))
