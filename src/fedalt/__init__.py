"""Personalised federated fine-tuning of language models with LoRA.

    import fedalt as fa

    data = fa.load_data("reviews.csv", clients=10, partition=fa.Dirichlet(0.5), seed=0)
    base = fa.load_base("meta-llama/Llama-3.2-1B", dtype="bfloat16")
    run = fa.run(data, base, method="fedalt", rounds=20, lr=3e-4, seed=0)
    print(run.scores.mean, run.client(3).answer("…"))

Names are imported when they are first used, so that this import is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedalt import testing
    from fedalt.api import Simulation, compare, load_base, load_data, load_run, run
    from fedalt.config.section import Settings
    from fedalt.data.partition_settings import Column, Dirichlet, GLDirichlet, Iid, Pathological, Quantity, SCDirichlet
    from fedalt.decorators import aggregator, method, metric, partitioner, source, template, tracker
    from fedalt.methods.base import Method, squared_distance

_PARTITIONS = ("Column", "Dirichlet", "GLDirichlet", "Iid", "Pathological", "Quantity", "SCDirichlet")
_NAMED = ("aggregator", "method", "metric", "partitioner", "source", "template", "tracker")
_WHERE = {
    **dict.fromkeys(("load_data", "load_base", "run", "compare", "load_run", "Simulation"), "fedalt.api"),
    **dict.fromkeys(_PARTITIONS, "fedalt.data.partition_settings"),
    **dict.fromkeys(_NAMED, "fedalt.decorators"),
    **dict.fromkeys(("Method", "squared_distance"), "fedalt.methods.base"),
    "Settings": "fedalt.config.section",
    "testing": "fedalt",
}
"""Public name → the module or package that has it."""


__all__ = [
    "Column",
    "Dirichlet",
    "GLDirichlet",
    "Iid",
    "Method",
    "Pathological",
    "Quantity",
    "SCDirichlet",
    "Settings",
    "Simulation",
    "aggregator",
    "compare",
    "load_base",
    "load_data",
    "load_run",
    "method",
    "metric",
    "partitioner",
    "run",
    "source",
    "squared_distance",
    "template",
    "testing",
    "tracker",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fedalt' has no attribute {name!r}")
    from fedalt.runtime import keep_libraries_quiet

    keep_libraries_quiet()  # they look before they are imported
    if name == "testing":
        return importlib.import_module("fedalt.testing")
    value = globals()[name] = getattr(importlib.import_module(_WHERE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
