"""The processes that Ray starts for simulated clients."""

from __future__ import annotations

import os


def usual_priority() -> None:
    """Let Ray's actors run like everything else: its own niceness, 15, starves them on a busy machine."""
    os.environ.setdefault("RAY_worker_niceness", "0")
