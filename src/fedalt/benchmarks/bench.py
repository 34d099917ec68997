"""Two sides in processes of their own, by turns; medians, spread and ratios.

``python -m fedalt.benchmarks.bench SPEC.json`` is such a process: it runs one side once and prints a line of JSON.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest import mock

from fedalt.benchmarks.side_command import finish
from fedalt.benchmarks.task import WHATS, Job, Spec
from fedalt.errors import UserError, choose
from fedalt.runtime import commit, peak_memory, versions


def describe() -> dict[str, Any]:
    """CPU, cores, memory, load before the bench, versions, commit."""
    import torch

    return {
        "cpu": _cpu(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "versions": versions(),
        "commit": commit(),
    }


def _cpu() -> str:
    """The processor's name, as Linux knows it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


Run = dict[str, Any]
Runner = Callable[[Spec], Run]
OnRun = Callable[[str, int, Run], None]
"""Called after every run with (side, number of the repeat, what it measured)."""


def compare(
    ours: Spec, other: Spec, repeats: int, runner: Runner, on_run: OnRun = lambda side, repeat, run: None
) -> dict[str, Any]:
    """Measure A and B by turns, and put them side by side."""
    runs: dict[str, list[Run]] = {"a": [], "b": []}
    for repeat, name in turns(repeats):
        spec = ours if name == "a" else other
        run = runner(spec)
        runs[name].append(run)
        on_run(spec.side, repeat, run)
    sides = {name: {"spec": asdict(spec), **_summary(runs[name])} for name, spec in (("a", ours), ("b", other))}
    return {
        "clients": ours.clients,
        **sides,
        "ratio": ratios([run["seconds"] for run in runs["a"]], [run["seconds"] for run in runs["b"]]),
        "memory_ratio": {
            name: sides["b"]["memory"][name]["median"] / value["median"]
            for name, value in sides["a"]["memory"].items()
            if name in sides["b"]["memory"] and value["median"]
        },
        "agreement": agreement(runs["a"][0], runs["b"][0]),
    }


def turns(repeats: int) -> Iterator[tuple[int, str]]:
    """A B, B A, A B, …: a machine that grows slower or faster is no side's advantage."""
    for repeat in range(repeats):
        yield from ((repeat, name) for name in ("ab" if repeat % 2 == 0 else "ba"))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def ratios(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """How many times longer B takes: by medians, and by the pairs that ran next to each other."""
    return {"of_medians": median(b) / median(a), "pairwise": spread([y / x for x, y in zip(a, b, strict=True)])}


def agreement(a: Run, b: Run) -> dict[str, Any]:
    """Whether both sides did the same: mean loss or norm on each, largest relative difference, equal answers.

    Where one side has fewer clients, those that both have are compared.
    """
    found: dict[str, Any] = {}
    pairs = list(zip(a["values"], b["values"], strict=False))
    if pairs:
        found["values"] = {"a": mean(x for x, _ in pairs), "b": mean(y for _, y in pairs)}
        apart = max(abs(x - y) / max(abs(x), abs(y), 1e-30) for x, y in pairs)
        found["largest_relative_difference"] = apart if math.isfinite(apart) else None
    answers = list(zip(a["answers"], b["answers"], strict=False))
    if answers:
        found["answers"] = {"same": sum(x == y for x, y in answers), "of": len(answers)}
    return found


def run_worker(spec: Spec) -> Run:
    """One side once, in a process of its own.

    Raises:
        RuntimeError: It failed otherwise.
    """
    threads = {"OMP_NUM_THREADS": str(spec.threads), "MKL_NUM_THREADS": str(spec.threads)} if spec.threads else {}
    with tempfile.TemporaryDirectory(prefix="fedalt-bench-") as folder, mock.patch.dict(os.environ, threads):
        path = Path(folder) / "spec.json"
        path.write_text(spec.to_json(), encoding="utf-8")
        out = finish([sys.executable, "-m", "fedalt.benchmarks.bench", str(path)])
    line = next(line for line in reversed(out.splitlines()) if line.startswith('{"seconds"'))  # libraries print, too
    return dict(json.loads(line))


def _summary(runs: Sequence[Run]) -> dict[str, Any]:
    names, speeds = runs[0]["memory"], [run.get("tokens_per_second", 0.0) for run in runs]
    return {
        "seconds": spread([run["seconds"] for run in runs]),
        "tokens_per_second": spread(speeds) if all(speeds) else None,
        "extrapolated": any(run["extrapolated"] for run in runs),
        "memory": {name: spread([run["memory"][name] for run in runs]) for name in names},
        "runs": list(runs),
    }


def measure(spec: Spec) -> dict[str, Any]:
    """Prepare a side, warm it up, and time its work."""
    import torch

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
            raise UserError("give one file: python -m fedalt.benchmarks.bench SPEC.json")
        result = measure(Spec.from_json(Path(arguments[0]).read_text(encoding="utf-8")))
    except UserError as error:
        sys.stderr.write("".join(f"error: {line}\n" for line in str(error).splitlines()))
        return 2
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
