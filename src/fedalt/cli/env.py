"""``fedalt env``: what a bug report should say about a machine."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from fedalt.cli.show import print_json, say

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
    "typer",
    "datasets",
    "flwr",
    "ray",
    "bitsandbytes",
    "tensorboard",
)
BF16 = {"amx_bf16", "avx512_bf16", "bf16", "svebf16"}
"""Units of x86 and Arm processors that multiply bf16, as Linux calls them."""


def env(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on stdout, for machines")] = False,
) -> None:
    """Say what fedalt runs on, for bug reports: versions, processor, memory, GPUs; no paths and no names of yours."""
    found = describe()
    if as_json:
        print_json(found)
        return
    lines = {
        "fedalt": f"{found['fedalt']}, commit {(found['commit'] or 'unknown')[:12]}",
        "python": found["python"],
        "system": found["system"],
        "cpu": f"{found['cpu']}, {found['cores']} cores, {found['threads']} torch threads, {found['instructions']}",
        "bf16 on cpu": "unknown" if found["bf16"] is None else ", ".join(found["bf16"]) or "no units for it",
        "memory": f"{found['memory'] / 1e9:.1f} GB",
        "gpus": "" if found["gpus"] else "none that torch can use",
    }
    for gpu in found["gpus"]:
        bf16 = "bf16" if gpu["bf16"] else "no bf16"
        lines[f"gpu {gpu['index']}"] = f"{gpu['name']}, {gpu['memory'] / 1e9:.1f} GB, sm {gpu['capability']}, {bf16}"
    lines["cuda"] = found["cuda"] or ""
    lines |= {name: number or "not installed" for name, number in found["versions"].items()}
    for name, line in lines.items():
        if line:
            say(f"{name:<14}{line}")


def describe() -> dict[str, Any]:
    """Versions, processor, memory in bytes, GPUs."""
    import torch

    from fedalt.benchmarks.bench import describe as machine

    here = machine()
    return {
        "fedalt": version("fedalt"),
        "commit": here["commit"],
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        **{name: here[name] for name in ("system", "cpu", "cores", "instructions", "memory")},
        "threads": torch.get_num_threads(),
        "bf16": bf16_units(Path("/proc/cpuinfo")),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "versions": {name: _version(name) for name in PACKAGES},
    }


def bf16_units(info: Path) -> list[str] | None:
    """The processor's units for bf16, from Linux's description of it; None where there is none."""
    if not info.is_file():
        return None
    lines = (line.partition(":") for line in info.read_text(encoding="utf-8").splitlines())
    flags = {word for name, _, words in lines if name.strip() in ("flags", "Features") for word in words.split()}
    return sorted(flags & BF16)


def _gpu(index: int) -> dict[str, Any]:
    import torch

    found = torch.cuda.get_device_properties(index)
    capability = f"{found.major}.{found.minor}"
    return {
        "index": index,
        "name": found.name,
        "memory": found.total_memory,
        "capability": capability,
        "bf16": found.major >= 8,  # Ampere and later
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
