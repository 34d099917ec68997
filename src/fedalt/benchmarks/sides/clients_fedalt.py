"""A whole ``fedalt run``: seconds per client and round of training and aggregation, and the peak memory of the process.

Start-up, scoring and files are in the memory but not in the seconds, which are those of the run's own ``round`` events.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from fedalt.benchmarks.sides.command import COMMAND, ROUNDS, arguments, children_peak, python
from fedalt.benchmarks.task import Job, Outcome, Spec
from fedalt.experiment.events import read_events


def prepare(spec: Spec) -> Job:
    """Everything before the clock: nothing, it is a process of its own."""

    def play() -> Outcome:
        with tempfile.TemporaryDirectory(prefix="fedalt-bench-") as folder:
            python("-c", COMMAND, *arguments(spec, Path(folder) / "run"))
            rounds = [
                event for event in read_events(Path(folder) / "run" / "events.jsonl") if event["event"] == "round"
            ]
        memory = {**rounds[-1]["peak_memory"], "process": children_peak()}
        return Outcome(spec.clients * ROUNDS, seconds=sum(event["seconds"] for event in rounds), memory=memory)

    return Job(lambda: None, play)
