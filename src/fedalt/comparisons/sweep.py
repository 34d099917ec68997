"""One comparison per value of a setting, or per combination of values of several."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from fedalt.comparisons.compare import finish, plan
from fedalt.comparisons.jobs import Budget
from fedalt.comparisons.tables import LOWER, Cell, Grid, Score, average, markdown, seeds, write_csv
from fedalt.config import RunConfig, with_settings
from fedalt.config.data import planted_note
from fedalt.data.load import Rows
from fedalt.errors import UserError
from fedalt.evaluation.metrics import metric_of
from fedalt.files import parse_yaml, write_json, write_text
from fedalt.methods.registry import Variant
from fedalt.runs.events import Sink
from fedalt.runs.folder import IfExists
from fedalt.runs.setup import Bases

Axis = tuple[str, list[Any]]
"""A setting's dotted key and its values."""
_ALIASES = {"federation.clients": "data.clients"}
"""How many clients there are is a matter of the rows, but looked for here, too."""
_ELSEWHERE = {"method": "--methods", "seed": "--seeds", "out": "--out"}
_KEPT = ("title", "mean", "validation", "ci95", "worst", "worst_client", "gain_over_local", "harmed", "against")
_COSTS = (
    "steps",
    "tokens",
    "parameters",
    "bytes_up",
    "bytes_down",
    "seconds",
    "scoring_seconds",
    "peak_memory",
    "peak_memory_gpu",
)


@dataclass(frozen=True)
class Point:
    """One combination of values."""

    settings: Mapping[str, Any]
    config: RunConfig

    @property
    def name(self) -> str:
        """``lora.r=4``, several with commas; also the name of its folder."""
        text = ",".join(f"{key}={_text(value)}" for key, value in self.settings.items())
        return re.sub(r"[^\w.,=+-]", "_", text)


def parse_axis(text: str) -> Axis:
    """Turn ``lora.r=4,6,8`` into a key and YAML values."""
    key, sign, values = text.partition("=")
    key = key.strip()
    if not sign or not key:
        raise UserError(f"--sweep {text}: write key.path=value,value, for example --sweep lora.r=4,6,8")
    if key in _ELSEWHERE:
        raise UserError(f"--sweep {text}: use {_ELSEWHERE[key]}")
    try:
        parsed = parse_yaml(f"[{values}]")
    except (yaml.YAMLError, ValueError):
        raise UserError(f"--sweep {text}: the values are not valid YAML") from None
    if not parsed:
        raise UserError(f"--sweep {text}: give at least one value, for example --sweep {key}=4,6,8")
    return _ALIASES.get(key, key), parsed


def axes_of(given: Mapping[str, Sequence[Any]]) -> list[Axis]:
    """Keys and values that Python gives; short names are those of ``run``."""
    for key, values in given.items():
        if key in _ELSEWHERE:
            raise UserError(f"sweep: {key} is not a setting to sweep; give {_ELSEWHERE[key].strip('-')}")
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise UserError(f"sweep: {key}: give a list of values, for example [4, 6, 8]")
    return [(_ALIASES.get(key, key), list(values)) for key, values in given.items()]


def points(config: RunConfig, axes: Sequence[Axis], rows: Rows | None = None) -> list[Point]:
    """Every combination of values, as configurations."""
    keys = [key for key, _ in axes]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice:
        raise UserError(f"--sweep {twice}: given twice; write all values in one list")
    made = []
    for values in product(*(values for _, values in axes)):
        settings = dict(zip(keys, values, strict=True))
        where = ", ".join(f"--sweep {key}={_text(value)}" for key, value in settings.items())
        made.append(Point(settings, with_settings(config, settings, where)))
    names = [point.name for point in made]
    same = next((name for name in names if names.count(name) > 1), None)
    if same:
        raise UserError(f"--sweep: {same} is there twice")
    rows = rows or Rows()
    for point in made:
        rows.both(point.config.data, config.seed)
    return made


def sweep(
    config: RunConfig,
    axes: Sequence[Axis],
    methods: Sequence[str | Variant],
    seeds: Sequence[int],
    out: Path,
    *,
    if_exists: IfExists,
    sink: Sink,
    jobs: int = 1,
    budget: Budget | None = None,
    bases: Bases | None = None,
    rows: Rows | None = None,
    partitions: int | None = None,
    margin: float | None = None,
) -> dict[str, Any]:
    """Compare once per point into ``out/<key>=<value>``, and write ``sweep.json``, .csv and .md.

    All points share one base as long as they ask for the same one. Settings that are not swept stay as configured:
    with another ``lora.r``, ``lora.alpha`` stays, so the scale alpha/r changes.
    """
    bases, rows = bases or Bases(), rows or Rows()
    todo = points(config, axes, rows)
    plans = [
        plan(point.config, methods, seeds, out / point.name, if_exists, budget=budget, partitions=partitions)
        for point in todo
    ]
    done = []
    held: Any = {"jobs": jobs, "bases": bases, "rows": rows, "margin": margin}
    for point, members in zip(todo, plans, strict=True):
        sink({"event": "point", "name": point.name})
        done.append(finish(members, point.config, out / point.name, if_exists, sink, **held))
    result = _collect(todo, done)
    write_json(out / "sweep.json", result)
    write_csv(out / "sweep.csv", sweep_lines(result))
    tables = "\n".join(markdown(grid) for grid in grids(result))
    write_text(out / "sweep.md", f"# Sweep on {result['source']}\n\n{tables}")
    return result


def _collect(todo: Sequence[Point], done: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = done[0]
    shared = {
        key: first[key] for key in ("metric", "source", "seeds", "draws", "margin", "reference", "below", "budget")
    }
    planted = max(comparison.get("canaries", 0) for comparison in done)
    return shared | {
        **({"canaries": planted} if planted else {}),
        "keys": list(todo[0].settings),
        "points": [
            {
                "name": point.name,
                "settings": dict(point.settings),
                "clients": len(comparison["tasks"]),
                "methods": {
                    name: {key: block[key] for key in (*_KEPT, *_COSTS)}
                    for name, block in comparison["methods"].items()
                },
            }
            for point, comparison in zip(todo, done, strict=True)
        ],
    }


def grids(result: Mapping[str, Any]) -> list[Grid]:
    """What is shown of a sweep: scores on test rows, and on validation rows where all clients have some."""
    known = all(block["validation"] is not None for point in result["points"] for block in point["methods"].values())
    return [sweep_grid(result), *([validation_grid(result)] if known else [])]


def validation_grid(result: Mapping[str, Any]) -> Grid:
    """Methods × points on validation rows, by which a value is chosen: the best of every method is marked."""
    first, metric = result["points"][0]["methods"], metric_of(result["metric"])

    def row(name: str) -> list[Cell]:
        scores = [point["methods"][name]["validation"] for point in result["points"]]
        best = metric.best(scores) if len(scores) > 1 else None
        return [first[name]["title"], *(f"{metric.text(score)}{' ←' if score == best else ''}" for score in scores)]

    notes = ["← the best value of each method; test rows are not to choose it"]
    title = f"{metric.title} on validation rows by {', '.join(result['keys'])}"
    return Grid(title, _head(result), [row(name) for name in first], notes=notes)


def sweep_grid(result: Mapping[str, Any]) -> Grid:
    """Methods × points, means over clients; what differs significantly from the reference is marked."""
    marks = {"better": " ↑", "worse": " ↓"}
    first, metric = result["points"][0]["methods"], metric_of(result["metric"])

    def row(name: str) -> list[Cell]:
        cells = [point["methods"][name] for point in result["points"]]
        scores = [average(cell, metric) for cell in cells]
        marked = [marks.get(cell["against"]["verdict"], "") if cell["against"] else "" for cell in cells]
        return [first[name]["title"], *(Score(s.value, f"{s.text}{m}") for s, m in zip(scores, marked, strict=True))]

    rows = [row(name) for name in first if name not in result["below"]]
    below = [row(name) for name in result["below"]]
    over = "draws of rows" if len(result.get("draws") or ()) > 1 else "seeds"
    notes = [planted_note(result["canaries"])] if result.get("canaries") else []
    notes += [f"mean over clients ± half of the 95 % interval over {over}; {seeds(result)}"]
    notes.append(f"↑ ↓ better or worse than {first[result['reference']]['title']} at the same value, see comparison.md")
    notes += [] if metric.higher_is_better else [LOWER]
    title = f"{metric.title} by {', '.join(result['keys'])}"
    return Grid(title, _head(result), rows or below, below if rows else [], notes, metric.higher_is_better)


def _head(result: Mapping[str, Any]) -> list[str]:
    return [" \\ ".join(["method", ", ".join(result["keys"])]), *map(values_of, result["points"])]


def values_of(point: Mapping[str, Any]) -> str:
    """The values of a point of ``sweep.json``, without their keys."""
    return ", ".join(_text(value) for value in point["settings"].values())


def sent_up(point: Mapping[str, Any], method: str) -> float:
    """Megabytes that a client of a point sent over the whole run, on average over clients and seeds."""
    return float(point["methods"][method]["bytes_up"] / point["clients"] / 1e6)


def sweep_lines(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line per point and method."""
    lines = []
    for point in result["points"]:
        for name, block in point["methods"].items():
            test = block["against"] or {}
            lines.append(
                {
                    **{key: _text(value) for key, value in point["settings"].items()},
                    "clients": point["clients"],
                    "method": name,
                    **{key: block[key] for key in _KEPT if key != "against"},
                    **{key: test.get(key) for key in ("difference", "p_adjusted", "verdict")},
                    **{key: block[key] for key in _COSTS},
                }
            )
    return lines


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
