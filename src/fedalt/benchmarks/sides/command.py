"""Whole processes as a side: ``fedalt run`` with a bench's settings, and what its children took."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fedalt.benchmarks import shapes
from fedalt.benchmarks.task import Spec
from fedalt.errors import UserError

ROUNDS = 2
COMMAND = "from fedalt.cli import main; main()"


def base(spec: Spec) -> str:
    """The model as ``fedalt run`` takes it.

    Raises:
        UserError: A shape with random weights, of which there is no folder to load.
    """
    if spec.model in shapes.SHAPES:
        raise UserError(
            f"--model {spec.model}: {spec.what} loads a model from disk; give {shapes.TINY} or a model folder"
        )
    return shapes.source(spec.model)


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
        UserError: It refused its input; the line is passed on.
        RuntimeError: It failed otherwise.
    """
    finish([sys.executable, *call])


def finish(call: Sequence[str]) -> str:
    """Run a process to its end and return its stdout.

    Raises:
        UserError: Exit code 2, or killed by the system.
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
