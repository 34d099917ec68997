"""What a shell offers after Tab: names, run folders, settings. Each function gets what has been typed of a word."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from fedalt.registry import METHODS

Offers = Iterator[str | tuple[str, str]]
"""Words, some with what they mean."""


def methods(incomplete: str) -> Offers:
    """Names of methods and of variants, as the text of their files has them: to import these takes seconds."""
    for path in sorted((Path(__file__).parents[1] / "methods").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        yield from re.findall(r'@METHODS\.register\("(\w+)"\)\nclass .*\n    \"{3}(.+?)(?:\"{3})?\n', text)
        yield from re.findall(r'^_variant\("(\w+)", "(.+?)"', text, re.MULTILINE)
    yield from entry_points(group=METHODS.group).names


def metrics(incomplete: str) -> Offers:
    """Names of metrics."""
    from fedalt.cli.known import metric_titles

    yield from metric_titles().items()


def recipes(incomplete: str) -> Offers:
    """Recipes that ship with fedalt."""
    from fedalt.cli.recipes import packaged, summary

    yield from ((name, summary(path)) for name, path in packaged().items())


def configs(incomplete: str) -> Offers:
    """YAML files here, folders that may have some, and recipes."""
    folder, _, start = incomplete.rpartition("/")
    for path in sorted(Path(folder or ("/" if incomplete.startswith("/") else ".")).glob(f"{start}*")):
        if path.suffix in (".yaml", ".yml") or path.is_dir():
            yield f"{path}{'/' if path.is_dir() else ''}"
    yield from recipes(incomplete)


def runs(incomplete: str) -> Offers:
    """Run folders below what has been typed; below ``runs`` where nothing has been."""
    start = Path(incomplete.rpartition("/")[0] or ".") if incomplete else Path("runs")
    found = (path.parent for depth in ("*", "*/*", "*/*/*") for path in start.glob(f"{depth}/config.yaml"))
    yield from sorted(map(str, found))


def settings(incomplete: str) -> Offers:
    """Dotted keys, each with ``=``; after it, the choices that a setting has."""
    key, equals, _ = incomplete.partition("=")
    if equals:
        yield from (f"{key}={choice}" for choice in choices(key)(""))
    else:
        yield from ((f"{name}=", field.description or "") for name, field in fields().items())


def choices(key: str) -> Callable[[str], Offers]:
    """What a setting may be, where that is one of a few words."""
    from fedalt.config import RunConfig
    from fedalt.config.hints import fields_at

    *path, last = key.split(".")
    return lambda incomplete: iter(_choices(fields_at(path, RunConfig).get(last)))


def listed(offer: Callable[[str], Offers]) -> Callable[[str], Offers]:
    """The same for a list with commas: what comes after the last of them."""

    def offers(incomplete: str) -> Offers:
        before, comma, last = incomplete.rpartition(",")
        taken = before.split(",")
        for one in offer(last):
            name, about = (one, "") if isinstance(one, str) else one
            if name not in taken:
                yield f"{before}{comma}{name}", about

    return offers


def fields(path: Sequence[str] = ()) -> dict[str, FieldInfo]:
    """Dotted key → field of every setting."""
    from fedalt.config import RunConfig
    from fedalt.config.hints import fields_at
    from fedalt.registry import sections

    found: dict[str, FieldInfo] = {}
    here = {name: field for name, field in fields_at(path, RunConfig).items() if name != "sections"}
    for name in (*here, *(() if path else sections())):
        found |= fields([*path, name]) or {".".join([*path, name]): here[name]}
    return found


def _choices(field: FieldInfo | None) -> list[str]:
    from fedalt.registry import Registry

    if field is None:
        return []
    names = [name for one in field.metadata if isinstance(one, Registry) for name in one.names()]
    return names or _words(field.annotation)


def _words(kind: Any) -> list[str]:
    if kind is bool:
        return ["true", "false"]
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    return [choice for part in get_args(kind) for choice in _words(part)]
