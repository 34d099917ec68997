"""No word to Flower's makers, and none from them."""

import os

from flwr.supercore.task_identity import TaskIdentity

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = (
    1  # what Flower's processes set before an app is called
)
