"""What is made of a single upload shows it as it is: it is told to nobody unless all have agreed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fedalt.config import RunConfig
from fedalt.errors import UserError
from fedalt.flower.consent import Consent, check_two
from fedalt.methods.registry import build, get_method
from fedalt.runs.setup import Bases
from flower.grid import LocalGrid
from flower.rounds import LATE, failures, notes, run
from support import METHODS

pytestmark = pytest.mark.usefixtures("clock")
AGREED = Consent(allow_two=True)
NOTHING_SHARED = ("local", "zero_shot")
HERE = [name for name in METHODS if not get_method(name).centralised]


@pytest.fixture(scope="module")
def bases() -> Bases:
    return Bases()


@pytest.mark.parametrize("name", HERE)
def test_two_clients_are_refused_by_every_method_that_shares(name: str) -> None:
    method = build(RunConfig(method=name), 2)
    check_two(method, allowed=True)
    if name in NOTHING_SHARED:
        check_two(method, allowed=False)
    else:
        with pytest.raises(UserError, match=r"with two clients .* add a third, or --allow-two"):
            check_two(method, allowed=False)


def absent(client: int, *rounds: int) -> Any:
    def arrange(grid: LocalGrid) -> None:
        grid.fault = lambda who, request: (
            "lost" if (who, request.do) == (client, "train") and request.round in rounds else None
        )

    return arrange


def told(grid: LocalGrid, round_: int) -> set[int]:
    return {c for c, r in grid.seen if r.do == "train" and r.round == round_ and r.told}


@pytest.mark.parametrize("method", ["fedalt", "fedit", "fdlora", "fedalt_median"])
def test_with_an_absent_third_nobody_sees_the_others_upload(method: str, tmp_path: Path, bases: Bases) -> None:
    grid, events = run(tmp_path, bases, absent(2, 1), method=method, **LATE)
    assert [e["client"] for e in events if e["event"] == "client" and e["round"] == 1] == [0, 1]
    assert told(grid, 2) == {2}, "of two uploads, neither of them its own"
    assert told(grid, 3) == {0, 1, 2}
    [said] = [text for text in notes(events) if "nothing is told" in text]
    assert said.startswith("nothing is told to clients 0, 1: only one other upload counts")


def test_by_this_rounds_participants_it_may_happen_at_any_time(tmp_path: Path, bases: Bases) -> None:
    changes = LATE | {
        "federation__rest_of_world_participation": "participants",
        "federation__rounds": 4,
        "evaluation__every": 4,
    }
    grid, _ = run(tmp_path, bases, absent(2, 2), **changes)
    assert [told(grid, n) for n in (2, 3, 4)] == [{0, 1, 2}, {2}, {0, 1, 2}]


def test_if_all_agree_it_is_told(tmp_path: Path, bases: Bases) -> None:
    grid, events = run(tmp_path, bases, absent(2, 1), consent=AGREED, flower__allow_two=True, **LATE)
    assert told(grid, 2) == {0, 1, 2}
    assert not notes(events)


def test_a_site_that_has_not_agreed_does_not_join(tmp_path: Path, bases: Bases) -> None:
    def arrange(grid: LocalGrid) -> None:
        grid.sites[2] = grid.site(2, consent=Consent())

    _, events = run(tmp_path, bases, arrange, consent=AGREED, flower__allow_two=True)
    assert {client for _, client, _ in failures(events)} == {2}
    assert any("a site that agrees is started with --allow-two" in reason for _, _, reason in failures(events))


def test_a_sampled_few_are_no_exception(tmp_path: Path, bases: Bases) -> None:
    """One a round: it is told the mean if that is its own upload."""
    changes = {"federation__fraction": 0.4, "federation__rounds": 5, "evaluation__every": 5, "flower__min_sites": 1}
    grid, _ = run(tmp_path, bases, method="fedit", **changes)
    asked = [(client, request.told) for client, request in grid.seen if request.do == "train"]
    assert [again for _, again in asked] == [False, *(one == other for (one, _), (other, _) in pairwise(asked))]
