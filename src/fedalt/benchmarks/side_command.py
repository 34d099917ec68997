"""Whole processes as a side: ``fedalt run`` with a bench's settings, and the least that any start must do.

Start-up, scoring and files are in the memory but not in the seconds, which are those of the run's own ``round`` events.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedalt.benchmarks import workload
from fedalt.benchmarks.task import Job, Outcome, Spec
from fedalt.errors import UserError
from fedalt.model.source import resolve_source
from fedalt.runs.events import read_events

ROUNDS = 2
COMMAND = "from fedalt.cli import main; main()"


def base(spec: Spec) -> str:
    """The model as ``fedalt run`` takes it."""
    if spec.model in workload.SHAPES:
        raise UserError(
            f"--model {spec.model}: {spec.what} loads a model from disk; give {workload.TINY} or a model folder"
        )
    return workload.source(spec.model)


def arguments(spec: Spec, out: Path) -> list[str]:
    """``fedalt run`` with few rows, two rounds of one epoch and hardly any scoring."""
    settings = {
        "data.train_limit": spec.rows,
        "data.test_limit": 2,
        "training.batch_size": spec.batch_size,
        "evaluation.max_new_tokens": 2,
        "model.dtype": spec.dtype,
        "lora.dropout": spec.dropout,
    }
    if spec.cohort:
        settings["federation.cohort"] = spec.cohort
    options = {
        "model": base(spec),
        "data": spec.data,
        "clients": spec.clients,
        "rounds": ROUNDS,
        "local-epochs": 1,
        "seed": spec.seed,
        "out": out,
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return ["run", *flags, *(part for key, value in settings.items() for part in ("--set", f"{key}={value}"))]


def python(*call: str) -> None:
    """Run this Python with some arguments, to the end.

    Raises:
        RuntimeError: It failed otherwise.
    """
    finish([sys.executable, *call])


def finish(call: Sequence[str]) -> str:
    """Run a process to its end and return its stdout.

    Raises:
        RuntimeError: Any other exit code but 0.
    """
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        lines = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise UserError("\n".join(lines) or done.stderr.strip())
    if done.returncode == -9:
        raise UserError(f"a process of this bench was killed, most likely for want of memory: {' '.join(call)}")
    if done.returncode:
        raise RuntimeError(f"{' '.join(call)} ended with code {done.returncode}\n{done.stderr.strip()}")
    return done.stdout


def children_peak() -> int:
    """Peak memory in bytes of the largest process that has been waited for."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def prepare_clients(spec: Spec) -> Job:
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


def prepare_start(spec: Spec) -> Job:
    """Everything before the clock: nothing, it is a process of its own."""

    def play() -> Outcome:
        with tempfile.TemporaryDirectory(prefix="fedalt-bench-") as folder:
            python("-m", "fedalt.benchmarks.first_step", *arguments(spec, Path(folder) / "run"))
        return Outcome(memory={"process": children_peak()})

    return Job(lambda: None, play)


_PROGRAM = """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
model.to("cuda" if torch.cuda.is_available() else "cpu")
"""


def prepare_transformers(spec: Spec) -> Job:
    """Everything before the clock: nothing, it is a process of its own."""
    folder = resolve_source(base(spec))

    def play() -> Outcome:
        python("-c", _PROGRAM, folder, spec.dtype)
        return Outcome(memory={"process": children_peak()})

    return Job(lambda: None, play)
