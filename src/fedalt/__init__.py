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

_DEALS = ("Column", "Dirichlet", "GLDirichlet", "Iid", "Pathological", "Quantity", "SCDirichlet")
_WHERE = {
    **dict.fromkeys(("load_data", "load_base", "run", "compare", "load_run", "Simulation"), "fedalt.api"),
    **dict.fromkeys(_DEALS, "fedalt.data.deals"),
}
"""Public name → the module that has it."""


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fedalt' has no attribute {name!r}")
    keep_libraries_quiet()  # they look before they are imported
    value = globals()[name] = getattr(importlib.import_module(_WHERE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
