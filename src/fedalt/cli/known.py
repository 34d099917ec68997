"""``fedalt methods``, ``metrics`` and ``env``: what there is, what it is made of and how it is set; the machine."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from fedalt.cli import complete, show
from fedalt.cli.show import Json, print_json, say
from fedalt.config.hints import in_words
from fedalt.errors import choose
from fedalt.registry import METHODS, METRICS, section_of, settings_of


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="say all about this one; FILE.py:Name, too", autocompletion=complete.methods
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List methods, and variants that are a method with other settings: what they send, where they come from."""
    chosen = METHODS.resolve(name) if name else None
    _show("methods", method_table(), chosen, as_json)


def metrics(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="say all about this one; FILE.py:Name, too", autocompletion=complete.metrics
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List what can be measured, and in which task."""
    chosen = METRICS.resolve(name) if name else None
    _show("metrics", metric_table(), chosen, as_json)


def _show(kind: str, known: Mapping[str, dict[str, Any]], name: str | None, as_json: bool) -> None:
    if name is not None:
        choose(kind.removesuffix("s"), name, known)
    if as_json:
        print_json(list(known.values()) if name is None else known[name])
    elif name is None:
        show.out.print(_table(kind, known))
    else:
        _page(known[name])


def _table(kind: str, known: Mapping[str, dict[str, Any]]) -> Table:
    """All but the long text and the settings, in two columns, so that nothing is cut in a narrow terminal."""
    table = Table(title=f"{kind}; fedalt {kind} NAME says more", title_justify="left", show_header=False, box=None)
    for name, one in known.items():
        short = "; ".join(
            f"sends {value}" if head == "sends" else value for head, value in one.items() if head not in _LONG
        )
        table.add_row(f"[bold]{name}[/]", f"{escape(short)}\n[dim]{escape(one['what it is'])}[/]")
    return table


_LONG = ("name", "what it is", "text", "settings")


def _page(one: Mapping[str, Any]) -> None:
    show.out.print(f"[bold]{escape(one['title'])}[/]  ({one['name']})", highlight=False)
    for head, value in one.items():
        if head not in (*_LONG, "title"):
            show.out.print(f"{head}: {escape(str(value))}", highlight=False)
    for paragraph in one["text"].replace("``", "").split("\n\n"):
        equation = paragraph.startswith(" ")
        text = paragraph if equation else " ".join(paragraph.split())
        show.out.print(f"\n{escape(text)}", highlight=False, soft_wrap=equation)
    for setting in one.get("settings", ()):
        show.out.print(f"\n[bold]{setting['key']}[/] = {escape(setting['default'])}", highlight=False)
        for line in (setting["what it may be"], setting["what it does"]):
            show.out.print(Padding(escape(line), (0, 0, 0, 4)), highlight=False)


def method_titles() -> dict[str, str]:
    """Name → title of methods and variants."""
    return {entry.name: entry.value.title or entry.name for entry in METHODS.entries()}


def method_table() -> dict[str, dict[str, Any]]:
    """Name → everything that is shown of a method or a variant."""
    from fedalt.methods.registry import Variant, get_method

    known: dict[str, dict[str, Any]] = {}
    for entry in METHODS.entries():
        kind = get_method(entry.name)
        text = inspect.cleandoc(kind.__doc__ or "")
        if isinstance(entry.value, Variant):
            changed = ", ".join(f"{key}={_yaml(value)}" for key, value in entry.value.settings.items())
            text = f"{method_titles()[entry.value.method]} with {changed}\n\n{text}"
        known[entry.name] = {
            "name": entry.name,
            "title": method_titles()[entry.name],
            "sends": _sent(entry.name),
            "source": kind.source or entry.origin,
            "what it is": _first_sentence(text),
            "text": text,
            "settings": _settings(section_of(kind), kind.Settings),
        }
    return known


def _sent(name: str) -> str:
    """What a client uploads in a round, by the method's own rule."""
    from fedalt.config import RunConfig
    from fedalt.methods.registry import build, configured
    from fedalt.names import MIXER

    method = build(configured(RunConfig(), name), 2, {"layer": (4, 4)})
    if method.centralised:
        return "its rows"
    keys = [key for key in method.shape.shapes() if method.shares(key)]
    parts = sorted({key.factor for key in keys if key.slot != MIXER})
    parts += ["mixer"] if any(key.slot == MIXER for key in keys) else []
    return ", ".join(parts) or "nothing"


def _settings(section: str, kind: type[BaseModel]) -> list[dict[str, Any]]:
    """The settings of a method, in words."""
    return [
        {
            "key": f"{section}.{key}",
            "what it may be": in_words(field),
            "default": "required" if field.is_required() else _yaml(field.default),
            "what it does": field.description or "",
        }
        for key, field in kind.model_fields.items()
    ]


def metric_titles() -> dict[str, str]:
    """Name → title of everything that can be measured."""
    from fedalt.evaluation.metrics import metric_of

    return {name: metric_of(name).title for name in METRICS.names()}


def metric_table() -> dict[str, dict[str, Any]]:
    """Name → everything that is shown of a metric."""
    from fedalt.evaluation.metrics import metric_of

    known: dict[str, dict[str, Any]] = {}
    for entry in METRICS.entries():
        metric, text = metric_of(entry.name), (inspect.getdoc(entry.value) or "").replace("``", "")
        order = "" if metric.higher_is_better else "lower is better"
        scale = ", ".join(filter(None, ["0 to 100" if metric.points else metric.unit, order]))
        known[entry.name] = {
            "name": entry.name,
            "title": metric.title,
            "task": {"text": "answers", "class": "classes"}.get(metric.task or "", "answers or classes"),
            "scale": scale or "a number, higher is better",
            "source": entry.origin,
            "what it is": _first_sentence(text),
            "text": text,
            "settings": _settings(section_of(entry), own) if (own := settings_of(entry.value)) else [],
        }
    return known


def _first_sentence(text: str) -> str:
    paragraph = text.partition("\n\n")[0]
    return " ".join(paragraph.split()).partition(". ")[0].rstrip(".").replace("``", "")


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


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


def env(as_json: Json = False) -> None:
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
