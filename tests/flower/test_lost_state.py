"""A site whose state is lost, or an older copy, between rounds takes nothing wrong out of a mean."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedalt.flower.requests import Request
from fedalt.flower.wire import unpack
from fedalt.runs.setup import Bases
from flower.grid import LocalGrid
from flower.rounds import elsewhere_trained, failures, notes, run

pytestmark = pytest.mark.usefixtures("clock")


@pytest.fixture(scope="module")
def bases() -> Bases:
    return Bases()


def before(do: str, round_: int, change: Callable[[LocalGrid], None]) -> Callable[[LocalGrid], None]:
    """Something happens to client 1 just before it hears of a request, once."""

    def arrange(grid: LocalGrid) -> None:
        left = iter([change])

        def wrong(client: int, request: Request) -> None:
            if (client, request.do, request.round) == (1, do, round_) and (happens := next(left, None)):
                happens(grid)

        grid.fault = wrong

    return arrange


def lost(grid: LocalGrid) -> None:
    shutil.rmtree(grid.folder / "1")
    grid.restart(1)


def older(grid: LocalGrid) -> None:
    """The copy was made a round ago."""
    [run_] = (grid.folder / "1").glob("run-*")
    shutil.rmtree(sorted(run_.glob("checkpoints/round_*"))[-1])
    grid.restart(1)


def uploads_of(grid: LocalGrid, round_: int) -> dict[int, Any]:
    return {
        c: unpack(reply.block) for c, r, reply in grid.sent if r.do == "train" and r.round == round_ and reply.block
    }


@pytest.mark.parametrize(("change", "holds"), [(lost, 0), (older, 1)])
def test_its_row_then_comes_from_the_server(
    change: Callable[[LocalGrid], None], holds: int, tmp_path: Path, bases: Bases
) -> None:
    grid, events = run(tmp_path, bases, before("train", 3, change))
    assert not list(failures(events))
    assert [e["client"] for e in events if e["event"] == "client" and e["round"] == 3] == [0, 1, 2]
    [said] = notes(events)
    assert said.startswith(f"client 1: holds the upload of round {holds}, and that of round 2 counts")
    first, second = [r for c, r in grid.seen if c == 1 and r.do == "train" and r.round == 3]
    uploads = uploads_of(grid, 2)
    assert first.share == pytest.approx(1 / 3) and second.share == 0
    for key, value in unpack(second.block).items():
        others = (uploads[0][key].double() + uploads[2][key].double()) / 2
        assert torch.allclose(value, others.float(), atol=1e-7)


@pytest.mark.parametrize("do", ["score", "save"])
def test_scores_and_models_do_not_come_of_a_wrong_row(do: str, tmp_path: Path, bases: Bases) -> None:
    grid, events = run(tmp_path, bases, before(do, 3, lost))
    assert not list(failures(events))
    assert [r.share for c, r in grid.seen if c == 1 and r.do == do] == [pytest.approx(1 / 3), 0]


def test_where_nothing_is_subtracted_there_is_nothing_to_do(tmp_path: Path, bases: Bases) -> None:
    grid, events = run(tmp_path, bases, before("train", 3, lost), method="fedit")
    assert not list(failures(events)) and not notes(events)
    assert [r.round for c, r in grid.seen if c == 1 and r.do == "train"] == [1, 2, 3]


def test_a_new_state_folder_with_another_base_is_refused(tmp_path: Path, bases: Bases) -> None:
    def change(grid: LocalGrid) -> None:
        lost(grid)
        grid.sites[1] = elsewhere_trained(grid)

    _, events = run(tmp_path, bases, before("train", 2, change), evaluation__every=1)
    assert {client for _, client, _ in failures(events)} == {1}
    assert all("base model, shapes, method or version are no longer" in reason for _, _, reason in failures(events))
    assert [e["client"] for e in events if e["event"] == "client" and e["round"] == 3] == [0, 2]
