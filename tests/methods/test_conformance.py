"""Every method of the registry, on every executor, through two rounds with a server in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedalt.config import FederationConfig
from fedalt.errors import UserError
from fedalt.federation.client import ClientResult
from fedalt.federation.server import Server
from fedalt.methods.registry import METHODS, VARIANTS, get_method
from fedalt.model.adapted import AdaptedModel
from fedalt.names import MIXER, ROW
from support import MODELS, RANK, bitwise, distance, examples, llama, method_of, run_rounds, start_states, training

ROWS = {client: examples(count, seed=client) for client, count in enumerate((7, 10, 3))}
CONFIG = training(max_grad_norm=0.5)
EXECUTORS: dict[str, dict[str, Any]] = {
    "stacked": {},
    "cohorts of two": {"cohort": 2},
    "loop": {"executor": "loop"},
}


def rounds(name: str, base: str = "llama", **options: Any) -> tuple[list[list[ClientResult]], Server]:
    return run_rounds(AdaptedModel(MODELS[base]()), method_of(name), ROWS, CONFIG, dropout=0.2, **options)


LIMITS = {"lora_fair": 1e-3, "pf2lora": 3e-4}
"""A thousand steps on the server add to rounding; a central difference divides it by a small number."""


@pytest.mark.parametrize("base", MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_executors_agree(name: str, base: str) -> None:
    limit = LIMITS.get(name, 1e-4)
    runs = {title: rounds(name, base, **options) for title, options in EXECUTORS.items()}
    expected, server = runs.pop("loop")
    for history, other in runs.values():
        for results, same in zip(history, expected, strict=True):
            for result, single in zip(results, same, strict=True):
                assert distance(result.state.tensors, single.state.tensors) < limit
                assert result.upload.keys() == single.upload.keys()
        if server.uploads:
            assert distance(other.mean(), server.mean()) < limit


@pytest.mark.parametrize("options", EXECUTORS.values(), ids=EXECUTORS)
@pytest.mark.parametrize("name", METHODS)
def test_a_second_run_is_bitwise_equal(name: str, options: dict[str, Any]) -> None:
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)  # the global stream must not matter
        history, server = rounds(name, **options)
        runs.append([result.state.tensors for results in history for result in results])
        runs[-1] += [server.mean()] if server.uploads else []
    assert all(bitwise(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_only_shared_tensors_leave_and_mixers_only_where_they_are_averaged(name: str) -> None:
    method = method_of(name)
    history, server = rounds(name)
    for result in history[-1]:
        assert all(method.shares(key) and method.trains(key) for key in result.upload)
        averaged = {MIXER} if name == "fedit_split" else set()
        assert {key.slot for key in result.upload} & {MIXER, ROW} == averaged
    shape = method.shape(RANK, AdaptedModel(llama()).layer_sizes)
    assert set(server.shapes) == set(method.upload(start_states(method, shape, [0])[0]))


@pytest.mark.parametrize("name", METHODS)
def test_what_others_do_reaches_a_client_only_through_the_server(name: str) -> None:
    """Other rows at client 2 change client 0 from the second round on, and never where nothing is shared."""
    others = ROWS | {2: examples(3, seed=99)}
    histories = []
    for rows in (ROWS, others):
        model = AdaptedModel(llama())
        history, _ = run_rounds(model, method_of(name), rows, CONFIG, executor="loop")
        histories.append([results[0].state.tensors for results in history])
    first, second = (bitwise(histories[0][i], histories[1][i]) for i in (0, 1))
    assert first
    assert second == (name in ("local", "zero_shot"))


@pytest.mark.parametrize("name", METHODS)
def test_broadcast_and_unicast_train_alike(name: str) -> None:
    runs = [rounds(name, federation=FederationConfig(row_delivery=how))[0][-1] for how in ("broadcast", "unicast")]
    assert all(distance(a.state.tensors, b.state.tensors) < 1e-4 for a, b in zip(*runs, strict=True))


PRESENT = ((0, 1), (2, 1), (0, 2))
"""Client 2 comes late, client 0 misses a round and comes back, client 1 is not there at the end."""


@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_executors_agree_when_clients_rest(name: str) -> None:
    limit = LIMITS.get(name, 1e-4)
    runs = [rounds(name, rounds=3, chosen=PRESENT, **options) for options in EXECUTORS.values()]
    expected, server = runs.pop()
    for history, other in runs:
        for results, same, present in zip(history, expected, PRESENT, strict=True):
            for result, single, client in zip(results, same, present, strict=True):
                assert result.state.client == single.state.client == client
                assert result.failure is None
                assert distance(result.state.tensors, single.state.tensors) < limit
        for client in ROWS:
            told = [each.messages((client,)) for each in (server, other)]
            assert told[0].keys() == told[1].keys()
            assert not told[0] or distance(*(message[client].tensors for message in told)) < limit


def test_registry_knows_its_methods_by_their_own_names() -> None:
    assert all(get_method(name).name == name for name in METHODS)
    with pytest.raises(UserError, match='did you mean "fedalt"'):
        get_method("fedlat")
