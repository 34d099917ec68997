"""The machine that a bench ran on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from fedalt.experiment.machine import commit, versions


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
