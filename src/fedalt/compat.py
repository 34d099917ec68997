"""Names that settings, slots and events had in fedalt 0.1, so that its files still open; nothing else knows them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fedalt.errors import UserError

SETTINGS = {
    "federation.row_participation": "federation.rest_of_world_participation",
    "federation.row_delivery": "federation.rest_of_world_delivery",
    "fedalt.row_aggregator": "fedalt.rest_of_world_aggregator",
    "fedalt.row_rank": "fedalt.rest_of_world_rank",
    "fedalt.row_from": "fedalt.rest_of_world_from",
    "fedalt.row_update": "fedalt.rest_of_world_update",
}
"""Old dotted key → today's."""
VALUES = {("fedalt.rest_of_world_update", "average_rows"): "average"}
"""Today's key and an old value → today's value."""
EVENTS = {"row_gap": "product_gap", "row_drift": "row_lora_drift"}
"""Old field of events.jsonl → today's."""
SLOT = re.compile(r"row(\d*)")
"""Old names of RoW LoRAs; ``row1`` is ``rest_of_world1``."""

_SECTIONS_0_1: dict[str, dict[str, Any]] = {
    "fedalt": {
        "row_aggregator": "factor_mean",
        "row_rank": None,
        "ridge": 0.01,
        "trim": 0.2,
        "byzantine": 1,
        "clusters": 1,
        "row_from": "others",
        "row_update": "frozen",
        "halved": False,
        "mixing": "mixer",
        "full_start": False,
        "mixer_average": False,
    },
    "fedit_split": {"parts": 2, "router": "softmax", "router_average": True, "scaling": "rank"},
    "feddpa": {"local_weight": 0.5, "samples": 5, "most": 0.5, "weight_target": "local", "embed_with": "local"},
    "pf2lora": {"private_rank": None, "private_lr": None, "hypergrad": "first_order", "private_scale": "same"},
    "fdlora": {
        "outer_lr": 0.7,
        "outer_momentum": 0.9,
        "sync_every": 5,
        "few_shot": 16,
        "budget": 40,
        "penalty": 0.05,
    },
    "hetlora": {"tail": 0.99, "decay": 5e-3, "prune": True},
    "lora_fair": {"solver": "sgd", "weight": 0.01, "lr": 0.01, "steps": 1000},
}
"""All sections of methods of fedalt 0.1 with their defaults: a run was known by all of them."""
_LATER: dict[str, dict[str, Any]] = {
    "model": {"adapter": None, "adapter_as": "merged", "device_map": None, "max_memory": None},
    "data": {"files": None, "boundary": "apart", "limit_by": "first", "canaries": 0},
    "lora": {"rslora": False, "layers": None, "exclude": [], "distribution": "uniform"},
    "training": {
        "accumulate": 1,
        "max_steps": None,
        "warmup": 0.0,
        "schedule_scope": "round",
        "optimizer": "adamw",
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "momentum": 0.0,
        "optimizer_state": "reset",
    },
    "federation": {"secure": False, "secure_min": 3},
    "evaluation": {"loss": False},
    "privacy": {
        "epsilon": None,
        "noise_multiplier": None,
        "delta": None,
        "clip": 1.0,
        "sampling": "poisson",
        "report": "scores",
    },
}
"""Section → settings that came after fedalt 0.1, with the value that changes nothing."""


def today(key: str, value: Any) -> tuple[str, Any]:
    """A dotted key and its value, under today's names."""
    key = SETTINGS.get(key, key)
    if isinstance(value, dict):
        return key, _section(key, value)
    return key, VALUES.get((key, value), value) if isinstance(value, str) else value


def settings_today(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings under today's names."""
    found = copy.deepcopy(dict(values))
    return {name: _section(name, part) if isinstance(part, dict) else part for name, part in found.items()}


def as_recorded(values: Mapping[str, Any], run: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Settings for a run whose config.yaml says ``run``, or these; what is not in it is as before there was such."""
    found, known = copy.deepcopy(dict(values)), values if run is None else run
    for section, settings in _LATER.items():
        if isinstance(found.get(section, {}), dict):
            later = {key: value for key, value in settings.items() if key not in (known.get(section) or {})}
            found[section] = {**later, **found.get(section, {})}
    return found


def without_later(frozen: dict[str, Any]) -> dict[str, Any]:
    """The settings that identify a run, without those that came later and change nothing."""
    if frozen["data"]["train_limit"] is None and frozen["data"]["test_limit"] is None:
        frozen["data"]["limit_by"] = "first"
    for section, settings in _LATER.items():
        frozen[section] = {k: v for k, v in frozen[section].items() if k not in settings or v != settings[k]}
    return {section: part for section, part in frozen.items() if section != "privacy" or part}


def _section(name: str, part: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, given in part.items():
        dotted, value = today(f"{name}.{key}", given)
        last = dotted.removeprefix(f"{name}.")
        if last in found:
            raise UserError(f'"{name}.{key}" and "{dotted}" are the same setting; leave one out')
        found[last] = value
    return found


def slot_today(name: str) -> str:
    """A slot's name today."""
    old = SLOT.fullmatch(name)
    return f"rest_of_world{old[1]}" if old else name


def event_today(event: dict[str, Any]) -> dict[str, Any]:
    """An event with today's fields."""
    return {EVENTS.get(name, name): value for name, value in event.items()}


def settings_0_1(frozen: Mapping[str, Any]) -> dict[str, Any] | None:
    """What identified a run in fedalt 0.1, of the settings that identify it today; None if it knew no such run."""
    values = copy.deepcopy(dict(frozen))
    for dotted, own in _flat(_LATER):
        section, _, name = dotted.rpartition(".")
        if values.get(section, {}).pop(name, own) != own:
            return None
    back = {(key, new): old for (key, old), new in VALUES.items()}
    for old, key in SETTINGS.items():
        section, _, name = key.partition(".")
        if name in values.get(section, {}):
            value = values[section].pop(name)
            values[section][old.partition(".")[2]] = back.get((key, value), value)
    for section, defaults in _SECTIONS_0_1.items():
        values[section] = {**defaults, **values.get(section, {})}
    return values


def _flat(values: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        yield from _flat(value, f"{start}{key}.") if isinstance(value, dict) else [(f"{start}{key}", value)]
