"""``fedalt run`` from the first line of Python to the end of its first optimiser step."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fedalt.benchmarks.sides.command import arguments, children_peak, python
from fedalt.benchmarks.task import Job, Outcome, Spec


def prepare(spec: Spec) -> Job:
    """Everything before the clock: nothing, it is a process of its own."""

    def play() -> Outcome:
        with tempfile.TemporaryDirectory(prefix="fedalt-bench-") as folder:
            python("-m", "fedalt.benchmarks.first_step", *arguments(spec, Path(folder) / "run"))
        return Outcome(memory={"process": children_peak()})

    return Job(lambda: None, play)
