"""The SuperNode that sleeps less than Flower's."""

from __future__ import annotations

import importlib
import time
from typing import Any

from fedalt.flower.deploy.node import Hasty


def test_nobody_sleeps_longer_than_the_limit() -> None:
    hasty, before = Hasty(0.01), time.monotonic()
    hasty.sleep(60)
    hasty.sleep(0.001)
    assert 0.011 <= time.monotonic() - before < 30
    assert hasty.monotonic is time.monotonic


def test_flowers_own_loop_sleeps_by_the_module_that_is_replaced() -> None:
    """If Flower changes how it waits, sites look for messages every 3 s again: this says so."""
    looking: Any = importlib.import_module("flwr.supernode.start_client_internal")
    assert looking.time is time
    assert "sleep" in looking.start_client_internal.__code__.co_names
    starting: Any = importlib.import_module("flwr.supercore.superexec.run_superexec")
    assert "get_executor" in starting.run_superexec.__code__.co_names
