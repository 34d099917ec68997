"""No word to Flower's makers, and none from them."""

import os

import pytest
from flwr.supercore.task_identity import TaskIdentity

from flower.grid import Clock, count_time

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = (
    1  # what Flower's processes set before an app is called
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Deadlines pass while the server waits, however long the sites take on this machine."""
    return count_time(monkeypatch)
