"""What goes wrong between server and sites either leaves the run as it would have been or is said and left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import micro
from fedalt.errors import UserError
from fedalt.flower.requests import Reply, Request
from fedalt.flower.wire import pack, unpack
from fedalt.names import INDIVIDUAL, REST_OF_WORLD, Key
from fedalt.runs.checkpoint import load_checkpoint
from fedalt.runs.setup import Bases
from flower.grid import Clock, LocalGrid
from flower.rounds import LATE, KilledError, elsewhere_trained, failures, killed_at, once, run, same
from flower.spoilt_site import HUGE, NAN, RANK

pytestmark = pytest.mark.usefixtures("clock")


@pytest.fixture(scope="module")
def bases() -> Bases:
    return Bases()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, bases: Bases) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return run(folder, bases)[0].models()


@pytest.mark.parametrize("do", ["join", "train", "score", "save"])
def test_a_node_that_goes_away_is_asked_again(
    do: str, tmp_path: Path, bases: Bases, undisturbed: dict[str, torch.Tensor]
) -> None:
    def arrange(grid: LocalGrid) -> None:
        grid.fault = once(1, {"join": 0, "train": 2}.get(do, 3), "gone", do)

    grid, events = run(tmp_path, bases, arrange)
    assert [request.do for client, request in grid.seen if client == 1].count(do) >= 2
    assert not list(failures(events))
    assert same(grid.models(), undisturbed)


@pytest.mark.parametrize("fault", ["lost", "late"])
def test_a_site_that_starts_anew_under_another_node_finishes_its_round(
    fault: str, tmp_path: Path, bases: Bases, undisturbed: dict[str, torch.Tensor]
) -> None:
    """Killed before it trained, or after it trained and before its reply was out."""

    def arrange(grid: LocalGrid) -> None:
        wrong = once(1, 2, fault)

        def killed(client: int, request: Request) -> str | None:
            found = wrong(client, request)
            if found:
                grid.node[1] = 777  # the answer of this call goes nowhere
            return found

        grid.fault = killed

    notes: list[str] = []
    grid, events = run(tmp_path, bases, arrange, sink=lambda e: notes.append(e.get("text", "")))
    assert "not heard of" in notes or "back under another node" in notes
    assert not list(failures(events))
    assert same(grid.models(), undisturbed)


def test_a_site_that_is_away_for_two_rounds_is_left_out_and_comes_back(tmp_path: Path, bases: Bases) -> None:
    def arrange(grid: LocalGrid) -> None:
        grid.fault = lambda client, request: (
            "lost" if client == 2 and request.do == "train" and request.round in (2, 3) else None
        )

    _, events = run(tmp_path, bases, arrange, federation__rounds=4, **LATE)
    assert list(failures(events)) == [(n, 2, "no answer within 1.5 s") for n in (2, 3)]
    trained = {n: [e["client"] for e in events if e["event"] == "client" and e["round"] == n] for n in (1, 2, 3, 4)}
    assert trained == {1: [0, 1, 2], 2: [0, 1], 3: [0, 1], 4: [0, 1, 2]}
    last = load_checkpoint(tmp_path / "run/checkpoints")
    assert last is not None and {c: upload.round for c, upload in last.uploads.items()} == {0: 4, 1: 4, 2: 4}


def test_a_late_upload_is_not_taken_out_of_a_mean_that_it_is_not_in(tmp_path: Path, bases: Bases) -> None:
    """The site has trained and holds another upload than the one that counts: its row is made by the server."""

    def arrange(grid: LocalGrid) -> None:
        grid.fault = once(2, 2, "late")

    grid, events = run(tmp_path, bases, arrange, **LATE)
    assert list(failures(events)) == [(2, 2, "no answer within 1.5 s")]
    told = {r.round: r for c, r in grid.seen if c == 2 and r.do == "train"}
    others = [unpack(reply.block) for c, r, reply in grid.sent if c != 2 and r.do == "train" and r.round == 2]
    assert told[3].share == 0
    for key, value in unpack(told[3].block).items():
        assert torch.allclose(value, sum(upload[key].double() for upload in others).float() / 2, atol=1e-7)


def test_late_rows_are_exact_after_the_server_was_resumed(tmp_path: Path, bases: Bases) -> None:
    """What a site holds is asked anew: the server that comes back knows it from the site alone."""

    def arrange(grid: LocalGrid) -> None:
        grid.fault = once(2, 2, "late")

    with pytest.raises(KilledError):
        run(tmp_path, bases, arrange, sink=killed_at("round_started", 3), **LATE)
    grid, _ = run(tmp_path, bases, if_exists="resume", **LATE)
    told = next(r for c, r in grid.seen if c == 2 and r.do == "train" and r.round == 3)
    last = load_checkpoint(tmp_path / "run/checkpoints")
    assert told.share == 0 and last is not None


@pytest.mark.parametrize("moment", ["round_started", "round", "evaluated"])
def test_a_server_that_ended_inside_a_round_is_resumed_without_a_trace(
    moment: str, tmp_path: Path, bases: Bases, undisturbed: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(KilledError):
        run(tmp_path, bases, sink=killed_at(moment, 3 if moment == "evaluated" else 2))
    grid, _ = run(tmp_path, bases, if_exists="resume")
    if moment == "round":
        assert [r.round for c, r in grid.seen if c == 0 and r.do == "train"] == [2, 3]
    assert same(grid.models(), undisturbed)


def failed(reply: Reply, code: str) -> Reply:
    return replace(reply, body=None, block=b"", error=code)


BAD: dict[str, tuple[Callable[[Reply], Reply], str]] = {
    "nan": NAN,
    "another rank": RANK,
    "huge": HUGE,
    "private": (
        lambda r: replace(r, block=pack({Key("m", REST_OF_WORLD, "A"): torch.ones(1, 1), **unpack(r.block)})),
        "upload has other tensors than this run",
    ),
    "no tensors": (lambda r: replace(r, block=b"hello"), "are no tensors"),
    "another round": (lambda r: replace(r, round=1), "answer to train, round 1"),
    "another run": (lambda r: replace(r, run="other"), "round 2 of other, not to train, round 2 of run-"),
    "nonsense": (lambda r: replace(r, body=None), "does not hold what was asked for"),
    "its own error": (lambda r: failed(r, "disk"), "disk full"),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_upload_that_does_not_fit_is_left_out_and_the_rest_go_on(kind: str, tmp_path: Path, bases: Bases) -> None:
    spoil, reason = BAD[kind]

    def arrange(grid: LocalGrid) -> None:
        grid.tamper = lambda client, request, reply: (
            spoil(reply) if (client, request.do, request.round) == (1, "train", 2) else reply
        )

    grid, events = run(tmp_path, bases, arrange)
    [(round_, client, said)] = failures(events)
    assert (round_, client) == (2, 1) and reason in said
    own = {r.round: unpack(reply.block) for c, r, reply in grid.sent if c == 0 and r.do == "train"}
    told = {(c, r.round): r for c, r in grid.seen if r.do == "train"}
    first = [unpack(reply.block) for c, r, reply in grid.sent if c == 1 and r.do == "train" and r.round == 1]
    mean = unpack(told[0, 3].block)
    third = [unpack(reply.block) for c, r, reply in grid.sent if c == 2 and r.do == "train" and r.round == 2]
    for key, value in mean.items():  # its upload of round 1 still counts
        expected = (own[2][key].double() + first[0][key].double() + third[0][key].double()) / 3
        assert torch.allclose(value, expected.float(), atol=1e-6)
    assert told[1, 3].share == 0
    assert all(value.isfinite().all() for value in grid.models().values())


def test_a_replayed_reply_of_an_earlier_round_does_not_count(tmp_path: Path, bases: Bases) -> None:
    kept: list[Reply] = []

    def arrange(grid: LocalGrid) -> None:
        def replay(client: int, request: Request, reply: Reply) -> Reply:
            if client == 1 and request.do == "train":
                kept.append(reply)
                return kept[0]
            return reply

        grid.tamper = replay

    _, events = run(tmp_path, bases, arrange)
    assert [(n, c) for n, c, _ in failures(events)] == [(2, 1), (3, 1)]


def test_a_site_with_another_base_is_refused_and_the_rest_go_on(tmp_path: Path, bases: Bases) -> None:
    def arrange(grid: LocalGrid) -> None:
        grid.sites[1] = elsewhere_trained(grid)

    grid, events = run(tmp_path, bases, arrange, flower__min_sites=2)
    said = [reason for _, client, reason in failures(events) if client == 1]
    assert said[0].startswith("cannot join: refused: its base model is ")
    assert {client for client, request in grid.seen if request.do == "train"} == {0, 2}
    assert micro.tree(tmp_path / "run")["results/final_scores.json"].count(b"rouge1") >= 2


def test_a_refused_site_that_went_and_came_as_it_should_be_is_let_in(
    tmp_path: Path, bases: Bases, clock: Clock
) -> None:
    """With a key it comes back under the same node."""

    def arrange(grid: LocalGrid) -> None:
        right, node = grid.sites[1], grid.node[1]
        grid.sites[1] = elsewhere_trained(grid)

        def change(client: int, request: Request) -> None:
            if request.do == "train" and client == 0:
                clock.sleep(1)  # the server looks for nodes once a second
                if request.round == 1:
                    del grid.node[1]
                elif request.round == 2:
                    grid.node[1], grid.sites[1] = node, right

        grid.fault = change

    _, events = run(tmp_path, bases, arrange, **LATE | {"federation__rounds": 4, "evaluation__every": 4})
    trained = {n: [e["client"] for e in events if e["event"] == "client" and e["round"] == n] for n in (1, 2, 3, 4)}
    assert trained[1] == trained[2] == [0, 2] and trained[4] == [0, 1, 2]


def test_a_model_that_a_site_could_not_save_is_said_with_its_own_error(tmp_path: Path, bases: Bases) -> None:
    def arrange(grid: LocalGrid) -> None:
        grid.tamper = lambda client, request, reply: (
            failed(reply, "disk") if (client, request.do) == (1, "save") else reply
        )

    _, events = run(tmp_path, bases, arrange)
    assert list(failures(events)) == [(3, 1, "model not saved: cannot write its state: disk full, or not permitted")]


def test_a_request_is_forgotten_a_minute_after_its_deadline(tmp_path: Path, bases: Bases) -> None:
    """Or a site that comes back after hours would train every round that it has missed."""
    grid, _ = run(tmp_path, bases, flower__round_deadline=300)
    assert grid.ttls == {360.0}


def test_too_few_sites_end_the_run_with_a_line(tmp_path: Path, bases: Bases) -> None:
    def arrange(grid: LocalGrid) -> None:
        grid.sites[1] = elsewhere_trained(grid)

    with pytest.raises(UserError, match=r"2 sites joined, flower.min_sites asks for 3: refused: its base model is"):
        run(tmp_path, bases, arrange, flower__min_sites=3)


def test_a_round_with_too_few_uploads_ends_the_run_with_a_line(tmp_path: Path, bases: Bases) -> None:
    def arrange(grid: LocalGrid) -> None:
        grid.tamper = lambda client, request, reply: (
            failed(reply, "memory") if request.do == "train" and request.round == 2 and client else reply
        )

    with pytest.raises(UserError, match=r"round 2: 1 sites delivered, flower.min_sites asks for 2 \(out of memory\)"):
        run(tmp_path, bases, arrange, flower__min_sites=2)
    assert [(n, c) for n, c, _ in failures(micro.events(tmp_path / "run"))] == [(2, 1), (2, 2)]


def test_a_site_that_comes_later_joins_the_next_round(tmp_path: Path, bases: Bases, clock: Clock) -> None:
    def arrange(grid: LocalGrid) -> None:
        node = grid.node.pop(2)

        def come(client: int, request: Request) -> None:
            if request.do == "train":
                grid.node[2] = node
                clock.sleep(1)  # the server looks for new nodes once a second

        grid.fault = come

    _, events = run(tmp_path, bases, arrange, **LATE)
    assert [e["client"] for e in events if e["event"] == "client" and e["round"] == 1] == [0, 1]
    assert [e["client"] for e in events if e["event"] == "client" and e["round"] == 3] == [0, 1, 2]
    assert (1, 2, "no answer within 1.5 s") in list(failures(events))


def test_nobody_but_this_runs_clients_is_asked(tmp_path: Path, bases: Bases, undisturbed: dict[str, Any]) -> None:
    def arrange(grid: LocalGrid) -> None:
        grid.sites[9] = grid.site(9)
        grid.node[9] = 9999

    grid, _ = run(tmp_path, bases, arrange)
    assert {request.do for client, request in grid.seen if client == 9} == {"who"}
    del grid.sites[9]
    assert same(grid.models(), undisturbed)


def test_the_uploads_on_the_wire_are_the_shared_factors(tmp_path: Path, bases: Bases) -> None:
    grid, _ = run(tmp_path, bases)
    for _, request, reply in grid.sent:
        slots = {key.slot for key in unpack(reply.block)}
        assert slots == ({INDIVIDUAL} if request.do == "train" else set())
