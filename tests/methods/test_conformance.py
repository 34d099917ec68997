"""Every method of the registry through ``check_method``, and on every executor and base through two rounds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch

from fedalt.config import FederationConfig
from fedalt.errors import UserError
from fedalt.federation.client import ClientResult
from fedalt.federation.server import Server
from fedalt.methods.registry import get_method
from fedalt.model.adapted import AdaptedModel
from fedalt.names import MIXER, REST_OF_WORLD
from fedalt.testing import check_method
from support import (
    METHODS,
    MODELS,
    RANK,
    VARIANTS,
    bitwise,
    distance,
    examples,
    llama,
    method_of,
    run_rounds,
    shape_of,
    start_states,
    training,
)

ROWS = {client: examples(count, seed=client) for client, count in enumerate((7, 10, 3))}
CONFIG = training(max_grad_norm=0.5)
EXECUTORS: dict[str, dict[str, Any]] = {
    "stacked": {},
    "cohorts of two": {"cohort": 2},
    "loop": {"executor": "loop"},
}


LAYERS = (
    "fedit", "ffa_lora", "fedit_split", "feddpa_f", "feddpa_t", "pf2lora", "fdlora", "hetlora", "ditto",
    "fedalt", "fedalt_shared_a", "fedalt_joint",
)  # fmt: skip
"""One of each way through layers and phases: ``check_method`` below holds all methods to the same on a Llama."""
LIMITS = {"lora_fair": 1e-3, "pf2lora": 5e-4}
"""A thousand steps on the server add to the one's rounding; the other's private step is 100 times the others'."""
ROUNDED = {("fedit_split", "bloom"): 5e-4, ("fedalt_shared_a", "bloom"): 1e-3}
"""An entry or two of a thousand has a gradient of 1e-8, AdamW's own ε: its step is rounding. Others are within 1e-5."""


def limit(name: str, base: str = "llama") -> float:
    """How far executors may be apart in what they sum in another order."""
    return ROUNDED.get((name, base), LIMITS.get(name, 1e-4))


def rounds(
    name: str, base: str = "llama", settings: Mapping[str, Any] | None = None, **options: Any
) -> tuple[list[list[ClientResult]], Server]:
    method = method_of(name, **(settings or {}))
    return run_rounds(AdaptedModel(MODELS[base]()), method, ROWS, CONFIG, dropout=0.2, **options)


@cache
def finished(name: str, executor: str, base: str = "llama") -> tuple[list[list[ClientResult]], Server]:
    """Rounds that no test changes."""
    return rounds(name, base, **EXECUTORS[executor])


@pytest.mark.parametrize("base", ["bloom", "gpt2"])
@pytest.mark.parametrize("name", LAYERS)
def test_executors_agree(name: str, base: str) -> None:
    runs = {title: finished(name, title, base) for title in EXECUTORS}
    expected, server = runs.pop("loop")
    for history, other in runs.values():
        for results, same in zip(history, expected, strict=True):
            for result, single in zip(results, same, strict=True):
                assert distance(result.state.tensors, single.state.tensors) < limit(name, base)
                assert result.upload.keys() == single.upload.keys()
        if server.uploads:
            assert distance(other.mean(), server.mean()) < limit(name, base)


@pytest.mark.parametrize("executor", ["cohorts of two", "loop"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_second_run_is_bitwise_equal(name: str, executor: str) -> None:
    runs = []
    model = AdaptedModel(llama())
    torch.manual_seed(2)  # the global stream must not matter, which building a model sets back
    again = run_rounds(model, method_of(name), ROWS, CONFIG, dropout=0.2, **EXECUTORS[executor])
    for history, server in (finished(name, executor), again):
        runs.append([result.state.tensors for results in history for result in results])
        runs[-1] += [server.mean()] if server.uploads else []
    assert all(bitwise(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_only_shared_tensors_leave_and_mixers_only_where_they_are_averaged(name: str) -> None:
    method = method_of(name)
    history, server = finished(name, "stacked")
    for result in history[-1]:
        assert all(method.shares(key) and method.trains(key) for key in result.upload)
        averaged = {MIXER} if name == "fedit_split" else set()
        assert {key.slot for key in result.upload} & {MIXER, REST_OF_WORLD} == averaged
    shape = shape_of(method, AdaptedModel(llama()).layer_sizes)
    assert set(server.shapes) == set(method.upload(start_states(method, shape, [0])[0]))


@pytest.mark.parametrize("name", METHODS)
def test_what_others_do_reaches_a_client_only_through_the_server(name: str) -> None:
    """Other rows at client 2 change client 0 from the second round on, and never where nothing is shared."""
    others = ROWS | {2: examples(3, seed=99)}
    changed, _ = run_rounds(AdaptedModel(llama()), method_of(name), others, CONFIG, dropout=0.2, executor="loop")
    first, second = (
        bitwise(one[0].state.tensors, other[0].state.tensors)
        for one, other in zip(finished(name, "loop")[0], changed, strict=True)
    )
    assert first
    assert second == (name in ("local", "zero_shot"))


@pytest.mark.parametrize("name", METHODS)
def test_broadcast_and_unicast_train_alike(name: str) -> None:
    assert FederationConfig().rest_of_world_delivery == "broadcast"
    unicast, _ = rounds(name, federation=FederationConfig(rest_of_world_delivery="unicast"))
    runs = [history[-1] for history in (finished(name, "stacked")[0], unicast)]
    assert all(distance(a.state.tensors, b.state.tensors) < 1e-4 for a, b in zip(*runs, strict=True))


UNEQUAL = ("local", "zero_pad", "hetlora", "flexlora", "flora", "fedalt_stack", "fedalt_svd")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in (*METHODS, *VARIANTS)},
    "lora_fair": ("lora_fair", {"lora_fair.steps": 100}),  # a thousand multiply rounding fourfold in every round
    **{f"{name}, unequal": (name, {"lora.ranks": (1, RANK, 2)}) for name in UNEQUAL},
    "hetlora, pruned": ("hetlora", {"hetlora.tail": 0.5, "hetlora.decay": 1.0}),
    "pf2lora, unrolled": ("pf2lora", {"pf2lora.hypergrad": "unrolled", "pf2lora.private_lr": 0.05}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_suite_that_anybodys_method_passes(case: str) -> None:
    """Executors, resumption, rest, uploads, purity, failures, isolation and answers, with dropout and clipping."""
    name, settings = CASES[case]
    check_method(name, settings=settings, tolerance=limit(name))


def test_registry_knows_its_methods_by_their_own_names() -> None:
    assert all(get_method(name).name == name for name in METHODS)
    with pytest.raises(UserError, match='did you mean "fedalt"'):
        get_method("fedlat")
