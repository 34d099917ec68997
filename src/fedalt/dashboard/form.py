"""Every setting as a field of a form, from the configuration's own JSON schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedalt.compat import as_recorded, settings_today
from fedalt.config import NAMED, RunConfig, load_config, parse_override, read_yaml
from fedalt.errors import UserError, choose
from fedalt.registry import sections

_RECIPES = Path(__file__).parents[1] / "recipes"
_ELSEWHERE = {"out", "sections"}
"""The folder has a field of its own; sections follow by their names."""


def fields() -> list[dict[str, Any]]:
    """Sections with their settings: key, type, range, choices, default and help."""
    schema = RunConfig.model_json_schema()
    made = list(_section("", schema, schema.get("$defs", {})))
    for name, kind in sections().items():
        own = kind.model_json_schema()
        made += _section(name, own, own.get("$defs", {}))
    return made


def _section(path: str, schema: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    here, below = list[dict[str, Any]](), list[dict[str, Any]]()
    for name, given in schema.get("properties", {}).items():
        key, about = f"{path}.{name}".lstrip("."), given
        if "$ref" in given:
            below += _section(key, known[given["$ref"].rpartition("/")[2]], known)
        elif key not in _ELSEWHERE:
            for part in given.get("anyOf", ()):
                about = about | part if part.get("type") != "null" else about
            default = given.get("default")
            here.append(
                {
                    "key": key,
                    "type": about.get("type", "string"),
                    "choices": about.get("enum", []),
                    "names": list(NAMED[key].names()) if key in NAMED else [],
                    "least": about.get("minimum", about.get("exclusiveMinimum")),
                    "most": about.get("maximum", about.get("exclusiveMaximum")),
                    "open": [end for end in ("Minimum", "Maximum") if f"exclusive{end}" in about],
                    "default": "" if default is None else text_of(default),
                    "help": given.get("description", ""),
                }
            )
    yield {"name": path, "about": schema.get("description", "").partition("\n")[0], "fields": here}
    yield from below


def text_of(value: Any) -> str:
    """A value as YAML has it in one line."""
    return str(
        yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).split("\n...")[0].strip()
    )


def read(values: Mapping[str, Any]) -> RunConfig:
    """The settings that a filled form asks for; what was left empty keeps its default."""
    overrides = [parse_override(f"{key}={text}") for key, text in values.items() if str(text).strip()]
    return load_config(None, overrides, {key: f"{key} {values[key]}" for key in values})


def recipes() -> dict[str, Path]:
    """Name → file of the settings that ship with fedalt."""
    return {path.relative_to(_RECIPES).with_suffix("").as_posix(): path for path in _RECIPES.rglob("*.yaml")}


def given_in(kind: str, name: str, runs: Mapping[str, Path]) -> dict[str, str]:
    """Dotted key → text of every setting of a recipe or of a run that is not the default."""
    if kind not in ("recipe", "run"):
        raise UserError(f"{kind}: must be recipe or run")
    known = recipes() if kind == "recipe" else {one: path / "config.yaml" for one, path in runs.items()}
    return unusual(known[choose(kind, name, known)], recorded=kind == "run")


def unusual(file: Path, recorded: bool = True) -> dict[str, str]:
    """Dotted key → text of every setting that is not the default; code that the settings name is not run."""
    values, usual = settings_today(read_yaml(file)), dict(_flat("", RunConfig().model_dump(mode="json")))
    for name, kind in sections().items():
        usual |= _flat(name, kind().model_dump(mode="json"))
    values = as_recorded(values) if recorded else values
    return {key: text_of(value) for key, value in _flat("", values) if key != "out" and usual.get(key) != value}


def _flat(path: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        dotted = f"{path}.{key}".lstrip(".")
        if isinstance(value, dict) and key != "label_names":
            yield from _flat(dotted, value)
        else:
            yield dotted, value
