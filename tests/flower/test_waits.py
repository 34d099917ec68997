"""What Flower's processes wait for, and how long they do here."""

from __future__ import annotations

import importlib
import inspect
import time
from typing import Any

import pytest
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError

from fedalt.flower import waits
from fedalt.flower.deploy.node import LOOP
from fedalt.flower.deploy.tasks import CLIENT_APP
from fedalt.flower.server_app import GRID
from fedalt.flower.waits import Waits, retry_soon
from flower.grid import Clock

PULLS = {LOOP: "pull_objects", CLIENT_APP: "pull_and_inflate_object_from_tree", GRID: "pull_objects"}
EMPTY, LOCAL = 3.0, 0.5  # what Flower sleeps after an empty look, and while a ClientApp is at work


class Waited(Clock):
    """Time that only waiting lets pass, and how long everyone waited."""

    def __init__(self) -> None:
        super().__init__()
        self.slept: list[float] = []

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        self.slept.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Waited:
    clock = Waited()
    monkeypatch.setattr(waits, "time", clock)
    return clock


def test_a_site_looks_often_after_a_message_and_rarely_after_a_long_wait(clock: Waited) -> None:
    loop = Waits(longest=2.0)
    loop.sleep(EMPTY)
    assert clock.slept == [0.1]
    while clock.monotonic() < 10:
        loop.sleep(EMPTY)
    assert clock.slept == sorted(clock.slept)
    assert clock.slept[-1] == pytest.approx((clock.monotonic() - clock.slept[-1]) / 10)
    while clock.monotonic() < 100:
        loop.sleep(EMPTY)
    assert max(clock.slept) == 2.0
    loop.sleep(LOCAL)
    loop.sleep(EMPTY)
    assert clock.slept[-2:] == [0.05, 0.1]


def test_a_limit_below_the_shortest_wait_holds(clock: Waited) -> None:
    Waits(longest=0.02).sleep(EMPTY)
    assert clock.slept == [0.02]


def test_all_else_is_the_module_time() -> None:
    assert Waits().time is time.time


@pytest.mark.parametrize(("module", "name"), PULLS.items())
def test_objects_that_are_not_there_yet_are_asked_for_again_soon(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = importlib.import_module(module)
    assert inspect.signature(getattr(place, name)).parameters["initial_backoff"].default > 0.05
    got = dict[str, Any]()
    monkeypatch.setattr(place, name, lambda *args, **kwargs: got.update(kwargs))
    retry_soon(module, name)
    getattr(place, name)(["object"])
    assert got == {"initial_backoff": 0.05}


def test_a_reply_whose_sender_died_over_it_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    place: Any = importlib.import_module(GRID)
    monkeypatch.setattr(place, "pull_objects", place.pull_objects)  # put back afterwards
    retry_soon(GRID, "pull_objects", longest=0.0)
    asked: list[str] = []

    def never(object_id: str) -> bytes:
        asked.append(object_id)
        raise ObjectUnavailableError(object_id)

    with pytest.raises(ObjectPullError):
        place.pull_objects(["object"], never)
    assert asked == ["object"]


def test_flower_waits_by_the_names_that_are_replaced() -> None:
    """If Flower changes how it waits, rounds take seconds longer again: this says so."""
    loop: Any = importlib.import_module(LOOP)
    assert loop.time is time
    assert "sleep" in loop.start_client_internal.__code__.co_names
    assert "sleep" in loop._push_messages.__code__.co_names
    assert "pull_objects" in loop._pull_and_store_message.__code__.co_names
    assert "pull_and_inflate_object_from_tree" in importlib.import_module(CLIENT_APP).pull_task_input.__code__.co_names
    assert "pull_objects" in importlib.import_module(GRID).HttpGrid.pull_messages.__code__.co_names
    starting: Any = importlib.import_module("flwr.supercore.superexec.run_superexec")
    assert "get_executor" in starting.run_superexec.__code__.co_names
