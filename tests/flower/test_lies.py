"""Whatever a site answers, it is taken or left out with one line, and no run ends of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedalt.flower.requests import Reply, Request
from fedalt.runs.setup import Bases
from flower.grid import LocalGrid
from flower.lies import ENVELOPE, JOIN, SCORE, TRAIN, Liar, every
from flower.rounds import failures, notes, run

pytestmark = pytest.mark.usefixtures("clock")
LIAR = 1
Replies = Mapping[tuple[int, str], Reply]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Replies:
    """What sites answer to a first round."""
    grid, _ = run(tmp_path_factory.mktemp("honest"), Bases(), federation__rounds=1, evaluation__every=1)
    return {(client, request.do): reply for client, request, reply in grid.sent}


class Repeated:
    """A site that has trained already and says the same to every round."""

    def __init__(self, client: int, replies: Replies) -> None:
        self.client, self.replies = client, replies

    def answer(self, request: Request) -> Reply:
        return replace(self.replies[self.client, request.do], run=request.run, round=request.round)


def lied(folder: Path, replies: Replies, lie: Callable[[Request], Liar | None], **changes: Any) -> list[dict[str, Any]]:
    """A run in which one site lies; its events."""

    def arrange(grid: LocalGrid) -> None:
        grid.sites = {client: Repeated(client, replies) for client in range(3)}  # type: ignore[misc]

        def tamper(client: int, request: Request, reply: Reply) -> Any:
            liar = lie(request) if client == LIAR else None
            return liar(reply) if liar else reply

        grid.tamper = tamper

    events = run(folder, Bases(), arrange, **changes)[1]
    assert [e["event"] for e in events].count("run_finished") == 1
    assert all(len(reason) <= 600 and "\n" not in reason for _, _, reason in failures(events))
    return events


def trained(events: list[dict[str, Any]]) -> dict[int, list[int]]:
    rounds = {e["round"]: list[int]() for e in events if e["event"] == "round"}
    for event in events:
        if event["event"] == "client":
            rounds[event["round"]].append(event["client"])
    return rounds


def test_there_are_more_than_a_hundred() -> None:
    assert sum(1 for _ in every()) > 150


@pytest.mark.slow
def test_a_round_goes_on_without_whoever_lies(tmp_path: Path, honest: Replies) -> None:
    lies = list((ENVELOPE | TRAIN).items())
    changes = {"federation__rounds": len(lies), "evaluation__every": len(lies)}
    events = lied(tmp_path, honest, lambda r: lies[r.round - 1][1] if r.do == "train" else None, **changes)
    for number, clients in trained(events).items():
        assert clients == [0, 2], lies[number - 1][0]
    assert [(n, c) for n, c, _ in failures(events)] == [(n, LIAR) for n in range(1, len(lies) + 1)]


@pytest.mark.slow
def test_scores_that_lie_are_left_out(tmp_path: Path, honest: Replies) -> None:
    lies = list((ENVELOPE | SCORE).items())
    changes = {"federation__rounds": len(lies), "evaluation__every": 1}
    events = lied(tmp_path, honest, lambda r: lies[r.round - 1][1] if r.do == "score" else None, **changes)
    for number, (name, _) in enumerate(lies, start=1):
        scored = [e["client"] for e in events if e["event"] == "scores" and e["round"] == number]
        assert set(scored) == {0, 2}, name
    said = [(n, c) for n, c, reason in failures(events) if reason.startswith("not scored: ")]
    assert said == [(n, LIAR) for n in range(1, len(lies) + 1)] + [(len(lies), LIAR)]  # the end asks once more


@pytest.mark.parametrize("name", JOIN)
def test_whoever_lies_when_it_joins_takes_no_part(name: str, tmp_path: Path, honest: Replies) -> None:
    events = lied(tmp_path, honest, lambda r: JOIN[name] if r.do == "join" else None, federation__rounds=1)
    assert trained(events) == {1: [0, 2]}
    assert next(failures(events))[:2] == (0, LIAR)


@pytest.mark.parametrize("name", ["client 99", "client '1'", "run 'other'", "half", "nested", "a field twice"])
def test_whoever_lies_about_who_it_is_takes_no_part(name: str, tmp_path: Path, honest: Replies) -> None:
    lie = ENVELOPE[name]
    events = lied(tmp_path, honest, lambda r: lie if r.do == "who" else None, federation__rounds=1)
    assert trained(events) == {1: [0, 2]}
    assert any("is refused" in text for text in notes(events)) == (name != "client 99")


def test_a_save_that_lies_is_said(tmp_path: Path, honest: Replies) -> None:
    events = lied(tmp_path, honest, lambda r: ENVELOPE["a list"] if r.do == "save" else None, federation__rounds=1)
    assert [(n, c, r[:15]) for n, c, r in failures(events)] == [(1, LIAR, "model not saved")]


def test_replies_that_come_twice_count_once(tmp_path: Path, honest: Replies) -> None:
    def arrange(grid: LocalGrid) -> None:
        grid.sites = {client: Repeated(client, honest) for client in range(3)}  # type: ignore[misc]
        pull = grid.pull_messages
        grid.pull_messages = lambda ids: [m for m in pull(ids) for _ in range(2)]  # type: ignore[method-assign]

    events = run(tmp_path, Bases(), arrange)[1]
    assert not list(failures(events))
    assert trained(events) == {number: [0, 1, 2] for number in (1, 2, 3)}
