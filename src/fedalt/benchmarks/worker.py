"""``python -m fedalt.benchmarks.worker SPEC.json`` runs one side once and prints one JSON line."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from fedalt.benchmarks.task import WHATS, Job, Spec, choose
from fedalt.errors import UserError


def measure(spec: Spec) -> dict[str, Any]:
    """Prepare a side, warm it up, and time its work."""
    import torch

    from fedalt.runs.machine import peak_memory

    choose("what", spec.what, WHATS)
    side, _, work = (
        WHATS[spec.what].job(choose("side", spec.side, ["fedalt", *WHATS[spec.what].opponents])).partition(".")
    )
    if spec.threads:
        torch.set_num_threads(spec.threads)
    module = importlib.import_module(f"fedalt.benchmarks.side_{side}")
    job: Job = getattr(module, f"prepare_{work}")(spec)
    torch.manual_seed(spec.seed)
    job.warm_up()
    _settle()
    started = time.perf_counter()
    outcome = job.work()
    _settle()
    elapsed = time.perf_counter() - started
    clock = elapsed if outcome.seconds is None else outcome.seconds
    memory = outcome.memory or peak_memory()
    return {
        "seconds": clock * outcome.scale / outcome.units,
        "elapsed": elapsed,
        "tokens": outcome.tokens,
        "tokens_per_second": outcome.tokens / clock,
        "extrapolated": outcome.scale > 1,
        "memory": {**memory, "process": memory["process"] + outcome.more_memory},
        "values": outcome.values,
        "answers": outcome.answers,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _settle() -> None:
    """Wait for the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(arguments: list[str]) -> int:
    """Exit code 2 and one line when the spec is wrong."""
    try:
        if len(arguments) != 1 or not Path(arguments[0]).is_file():
            raise UserError("give one file: python -m fedalt.benchmarks.worker SPEC.json")
        result = measure(Spec.from_json(Path(arguments[0]).read_text(encoding="utf-8")))
    except UserError as error:
        sys.stderr.write("".join(f"error: {line}\n" for line in str(error).splitlines()))
        return 2
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
