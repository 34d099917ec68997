"""What a process does before anything else: memory, quiet libraries, priority; and what it ran on."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KERNELS = 64
"""Compiled kernels that are kept, a quarter of a megabyte each (by default 1,024): packed rows have a new number of
tokens at each step, and most kernels would never be used again."""
_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Who keeps them: oneDNN, and torch's own bridge to it."""
_SECONDS = 5.0
"""Time between two releases: each costs about a tenth of a second, in pages to be taken anew."""


class _Released:
    at = 0.0


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep what is freed and to take no memory by ``mmap``, for the life of the process.

    A training step allocates and frees the same hundreds of megabytes over and over; by default every large tensor is
    mapped, zeroed page by page, and unmapped again. Call it before torch computes anything. Without glibc, only the
    number of compiled kernels is limited.
    """
    for variable in _CACHES:
        os.environ.setdefault(variable, str(_KERNELS))
    mallopt = _glibc("mallopt")
    if mallopt is not None:
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20)):
            mallopt(option, value)


def release_freed_memory() -> None:
    """Give the system back what is kept but free, if that has not been done for a while; called between cohorts.

    Cohorts need tensors of other sizes each time, and what is kept breaks up into pieces too small for the next one.
    """
    trim, now = _glibc("malloc_trim"), time.monotonic()
    if trim is not None and now - _Released.at > _SECONDS:
        trim(0)
        _Released.at = now


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def keep_libraries_quiet() -> None:
    """Keep the libraries' own progress bars and hints out of ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm, in a notebook without widgets
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def usual_priority() -> None:
    """Let Ray's actors run like everything else: its own niceness, 15, starves them on a busy machine."""
    os.environ.setdefault("RAY_worker_niceness", "0")


_PACKAGES = ("fedalt", "torch", "transformers", "peft", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


@cache
def commit() -> str | None:
    """Commit of the checkout that fedalt is installed from, if it is one."""
    call = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def peak_memory() -> dict[str, int]:
    """Peak memory so far in bytes: of the process, and of the GPU if there is one."""
    import torch

    peak = {"process": _peak_resident()}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


def forget_peak_memory() -> None:
    """Let ``peak_memory`` count from now on; on systems other than Linux only that of the GPU can."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts at what is resident now


def _peak_resident() -> int:
    """Linux's own count for this program: ``ru_maxrss`` would include the process that started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
