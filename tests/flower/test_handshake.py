"""Sites must have base, method, shapes and version in common: whoever has not is refused, and the rest go on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import micro
from fedalt.config import parse_config
from fedalt.errors import UserError
from fedalt.flower.members import rule_of
from fedalt.flower.requests import Common, Member, Reply
from fedalt.methods.registry import build, configured
from fedalt.runs.setup import Bases
from flower.grid import LocalGrid
from flower.rounds import failures, run

pytestmark = pytest.mark.usefixtures("clock")
SAYS: dict[str, tuple[Callable[[Common], Any], str]] = {
    "base": (lambda common: "0" * 64, "its base model is 000000000000, this run's is "),
    "method": (lambda common: "0" * 64, "its method and settings are 000000000000, this run's are "),
    "shapes": (lambda common: common.shapes[1:], "its uploads would have other shapes than this run's"),
    "fedalt": (lambda common: "0.0.1", "it has fedalt 0.0.1, this run "),
    "trainable": (lambda common: 1, "its adapters are of another size"),
}


@pytest.fixture(scope="module")
def bases() -> Bases:
    return Bases()


def saying(what: str, clients: set[int]) -> Callable[[LocalGrid], None]:
    """These clients' sites have something else."""
    other, _ = SAYS[what]

    def tamper(client: int, request: Any, reply: Reply) -> Reply:
        if client not in clients or request.do != "join":
            return reply
        assert isinstance(reply.body, Member)
        common = reply.body.common
        return replace(reply, body=replace(reply.body, common=replace(common, **{what: other(common)})))

    return lambda grid: setattr(grid, "tamper", tamper)


@pytest.mark.parametrize("what", SAYS)
def test_a_site_with_something_else_is_refused(what: str, tmp_path: Path, bases: Bases) -> None:
    grid, events = run(tmp_path, bases, saying(what, {1}), federation__rounds=1)
    said = [reason for _, client, reason in failures(events) if client == 1]
    assert said[0].startswith(f"cannot join: refused: {SAYS[what][1]}")
    assert {client for client, request in grid.seen if request.do == "train"} == {0, 2}


def test_the_method_is_the_servers_and_not_the_majoritys(tmp_path: Path, bases: Bases) -> None:
    with pytest.raises(UserError, match=r"1 sites joined.*its method and settings are"):
        run(tmp_path, bases, saying("method", {0, 1}))


def rule(**changes: Any) -> str:
    values = micro.settings(Path("run"), **{"method": "fedalt", **changes})
    config = parse_config(values, "s")
    config = configured(config, config.method)
    return rule_of(config, build(config, 3))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "fedit"},
        {"method": "fedalt_median"},
        {"lora__r": 2},
        {"training__lr": 0.01},
        {"federation__weighting": "samples"},
        {"model__dtype": "bfloat16"},
        {"flower__wire": "bf16"},
    ],
)
def test_what_changes_the_numbers_changes_the_fingerprint(changes: dict[str, Any]) -> None:
    assert rule(**changes) != rule()


@pytest.mark.parametrize(
    "changes",
    [
        {"model__name": "elsewhere", "model__device": "cuda:1"},
        {"data__source": "rows"},
        {"federation__rounds": 9, "federation__cohort": 2},
        {"flower__min_sites": 3, "flower__round_deadline": 5},
        {"evaluation__every": 2},
    ],
)
def test_what_is_a_sites_own_does_not(changes: dict[str, Any]) -> None:
    assert rule(**changes) == rule()
