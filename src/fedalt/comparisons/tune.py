"""A random search on validation rows before a comparison: the learning rate and a method's own settings.

Every method has the same number of trials, the first one with its settings as they are. The learning rate is looked
for from a tenth to ten times of the configured one, and is the same in the i-th trial of every method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import exp, log
from typing import Any

import numpy as np

from fedalt.config import RunConfig
from fedalt.config.section import Span
from fedalt.methods.registry import Variant, get_method
from fedalt.registry import METHODS, section_of
from fedalt.seeding import derive_seed

_RATE = 10
"""How far the learning rate goes, either way."""
_EDGE = 0.1
"""Share of a range at its ends, in logarithms, that counts as its edge."""


def spans(config: RunConfig, choice: Variant) -> dict[str, Span]:
    """What is tuned of a method, dotted key → where: not what makes a variant of it, or was given with it."""
    kind, lr, known = get_method(choice.method), config.training.lr, METHODS.get(choice.method)
    found = {"training.lr": Span(lr / _RATE, lr * _RATE)}
    for key, field in kind.Settings.model_fields.items():
        found |= {f"{section_of(kind)}.{key}": one for one in field.metadata if isinstance(one, Span)}
    fixed = {*choice.settings, *(known.settings if isinstance(known, Variant) else ())}
    return {key: span for key, span in found.items() if key not in fixed}


def trials(where: Mapping[str, Span], choice: Variant, seed: int, count: int) -> list[Variant]:
    """The method with the settings of each trial; the first one as it is."""
    drawn = [{key: _drawn(span, seed, key, i) for key, span in where.items()} for i in range(1, count)]
    return [
        replace(
            choice, settings={**choice.settings, **values}, given=",".join(filter(None, (choice.given, f"trial{i}")))
        )
        for i, values in enumerate([{}, *drawn])
    ]


def _drawn(span: Span, seed: int, key: str, trial: int) -> Any:
    rng = np.random.default_rng(derive_seed(seed, "tune", key, trial))
    if span.values:
        return span.values[int(rng.integers(len(span.values)))]
    return float(f"{exp(rng.uniform(log(span.low), log(span.high))):.3g}")


def at_edge(where: Mapping[str, Span], settings: Mapping[str, Any]) -> list[str]:
    """Settings that lie at an end of their range: a wider one may be better."""
    places = {
        key: log(settings[key] / span.low) / log(span.high / span.low)
        for key, span in where.items()
        if not span.values and key in settings
    }
    return [key for key, place in places.items() if not _EDGE <= place <= 1 - _EDGE]
