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

from fedalt.quiet import keep_libraries_quiet

if TYPE_CHECKING:
    from fedalt import testing as testing
    from fedalt.api import Simulation as Simulation
    from fedalt.api import compare as compare
    from fedalt.api import load_base as load_base
    from fedalt.api import load_data as load_data
    from fedalt.api import load_run as load_run
    from fedalt.api import run as run
    from fedalt.data.deals import Column as Column
    from fedalt.data.deals import Dirichlet as Dirichlet
    from fedalt.data.deals import GLDirichlet as GLDirichlet
    from fedalt.data.deals import Iid as Iid
    from fedalt.data.deals import Pathological as Pathological
    from fedalt.data.deals import Quantity as Quantity
    from fedalt.data.deals import SCDirichlet as SCDirichlet
    from fedalt.decorators import aggregator as aggregator
    from fedalt.decorators import method as method
    from fedalt.decorators import metric as metric
    from fedalt.decorators import partitioner as partitioner
    from fedalt.decorators import source as source
    from fedalt.decorators import template as template
    from fedalt.decorators import tracker as tracker
    from fedalt.methods.base import Method as Method
    from fedalt.methods.base import squared_distance as squared_distance
    from fedalt.section import Settings as Settings

_DEALS = ("Column", "Dirichlet", "GLDirichlet", "Iid", "Pathological", "Quantity", "SCDirichlet")
_NAMED = ("aggregator", "method", "metric", "partitioner", "source", "template", "tracker")
_WHERE = {
    **dict.fromkeys(("load_data", "load_base", "run", "compare", "load_run", "Simulation"), "fedalt.api"),
    **dict.fromkeys(_DEALS, "fedalt.data.deals"),
    **dict.fromkeys(_NAMED, "fedalt.decorators"),
    **dict.fromkeys(("Method", "squared_distance"), "fedalt.methods.base"),
    "Settings": "fedalt.section",
    "testing": "fedalt",
}
"""Public name → the module or package that has it."""


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fedalt' has no attribute {name!r}")
    keep_libraries_quiet()  # they look before they are imported
    if name == "testing":
        return importlib.import_module("fedalt.testing")
    value = globals()[name] = getattr(importlib.import_module(_WHERE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
