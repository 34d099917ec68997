"""A run across sites that is resumed with other settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedalt.errors import UserError
from fedalt.runs.setup import Bases
from flower.rounds import KilledError, killed_at, run, same

pytestmark = pytest.mark.usefixtures("clock")
OTHER: dict[str, dict[str, Any]] = {
    "lr": {"training__lr": 0.01},
    "method": {"method": "fedit"},
    "seed": {"seed": 4},
}


@pytest.fixture(scope="module")
def bases() -> Bases:
    return Bases()


@pytest.mark.parametrize("kind", OTHER)
def test_uploads_made_under_other_settings_are_not_taken(kind: str, tmp_path: Path, bases: Bases) -> None:
    """The sites have trained the first round, the server has not finished it."""
    fresh, _ = run(tmp_path / "fresh", bases, **OTHER[kind])
    with pytest.raises(KilledError):
        run(tmp_path, bases, sink=killed_at("client", 1))
    old = {path for client in range(3) for path in (tmp_path / "sites" / str(client)).glob("run-*")}
    grid, _ = run(tmp_path, bases, if_exists="resume", **OTHER[kind])
    new = {path for client in range(3) for path in (tmp_path / "sites" / str(client)).glob("run-*")} - old
    assert len(old) == len(new) == 3
    assert not any((path / "clients").exists() for path in old)
    assert same(grid.models(), fresh.models())


def test_a_finished_round_keeps_its_settings(tmp_path: Path, bases: Bases) -> None:
    with pytest.raises(KilledError):
        run(tmp_path, bases, sink=killed_at("round_started", 2))
    with pytest.raises(UserError, match="checkpoint of another run"):
        run(tmp_path, bases, if_exists="resume", training__lr=0.01)


def test_how_many_sites_and_how_long_may_change(tmp_path: Path, bases: Bases) -> None:
    undisturbed, _ = run(tmp_path / "undisturbed", bases)
    with pytest.raises(KilledError):
        run(tmp_path, bases, sink=killed_at("client", 2), flower__min_sites=3)
    grid, _ = run(tmp_path, bases, if_exists="resume", flower__min_sites=2, flower__round_deadline=60)
    assert same(grid.models(), undisturbed.models())
    assert [r.round for c, r in grid.seen if c == 0 and r.do == "train"] == [2, 3]
