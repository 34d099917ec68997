"""What keeps memory independent of the number of clients: lazy mappings, one upload at a time, cohorts."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedalt.config import FederationConfig
from fedalt.federation import diagnostics
from fedalt.federation.client import cohort_size, cohorts, run_clients
from fedalt.federation.diagnostics import ProductSum, product_gap
from fedalt.federation.server import PerClient, Server
from fedalt.model.adapted import AdaptedModel
from fedalt.names import Key, Tensors
from support import examples, llama, method_of, plans_of, quick, random_states, round_settings, shape_of, training

METHOD = method_of("fedalt", 6)
SHAPE = shape_of(METHOD, {"x.one": (6, 4), "x.two": (4, 8)})
SHARED = {key: size for key, size in SHAPE.shapes().items() if METHOD.shares(key)}


class Disk:
    """Uploads that are made anew each time they are read; knows who was read and how many were alive at once."""

    def __init__(self) -> None:
        self.reads: list[int] = []
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.most = 0

    def __call__(self, client: int) -> Tensors:
        class Upload(dict[Key, torch.Tensor]):
            __hash__ = object.__hash__

        self.reads.append(client)
        upload = Upload(self.upload(client))
        self.alive.add(upload)
        self.most = max(self.most, len(self.alive))
        return upload

    @staticmethod
    def upload(client: int) -> dict[Key, torch.Tensor]:
        generator = torch.Generator().manual_seed(client)
        return {key: torch.randn(size, generator=generator) for key, size in SHARED.items()}


def server(clients: int, **config: Any) -> tuple[Server, Disk]:
    disk = Disk()
    made = Server(METHOD, FederationConfig(**config), {c: c + 1 for c in range(clients)}, SHARED)
    made.receive(range(clients), disk, 1)
    return made, disk


# ------------------------------------------------------------------------------------------------------- PerClient


def test_a_value_is_made_when_it_is_asked_for_and_each_time_anew() -> None:
    made: list[int] = []
    values = PerClient([4, 2], lambda client: made.append(client) or [client])
    assert (list(values), len(values), 4 in values, 3 in values, values.get(3)) == ([4, 2], 2, True, False, None)
    assert made == [], "looking at the clients makes nothing"
    assert values[2] == [2]
    assert values[2] is not values[2]
    assert made == [2, 2, 2]
    assert [value for value in values.values()] == [[4], [2]]  # noqa: C416 - one by one
    with pytest.raises(KeyError):
        values[3]


# ---------------------------------------------------------------------------------------------------------- server


@quick
@given(clients=st.integers(2, 7), weighting=st.sampled_from(["uniform", "samples"]))
def test_the_streamed_mean_is_the_literal_mean_in_fp64(clients: int, weighting: str) -> None:
    one, disk = server(clients, weighting=weighting)
    weights = [float(c + 1 if weighting == "samples" else 1) for c in range(clients)]
    total = sum(weights)
    for key, value in one.mean().items():
        literal = sum(w * Disk.upload(c)[key].double() for c, w in enumerate(weights))
        assert torch.equal(value, (literal / total).float())  # type: ignore[union-attr]
    assert disk.most == 1


def test_one_upload_is_in_memory_at_a_time() -> None:
    one, disk = server(5, rest_of_world_delivery="unicast")
    messages = one.messages(range(5))
    one.mean()
    messages[3]
    gc.collect()
    assert disk.most == 1
    product_gap(PerClient(one.uploads, disk).values())
    assert disk.most <= 2, "a loop's variable lives until the next value"


def test_the_broadcast_mean_is_one_object() -> None:
    one, disk = server(4)
    disk.reads.clear()
    messages = one.messages(range(4))
    assert disk.reads == [0, 1, 2, 3]
    assert len({id(message.tensors) for message in messages.values()}) == 1
    assert disk.reads == [0, 1, 2, 3], "and made once"


@pytest.mark.parametrize(
    ("config", "alone"), [({"rest_of_world_delivery": "unicast"}, {0, 1, 2}), ({"weighting": "samples"}, {2})]
)
def test_a_mean_without_a_client_is_made_when_it_is_asked_for(config: dict[str, str], alone: set[int]) -> None:
    """By rows client 2 has 7 of 10, more than half."""
    one, disk = server(3, **config)
    one.samples = {0: 1, 1: 2, 2: 7}
    one.receive(range(3), disk, 2)
    messages = one.messages(range(3))
    for client in range(3):
        disk.reads.clear()
        message = messages[client]
        assert disk.reads == ([c for c in range(3) if c != client] if client in alone else [])
        assert (message.share == 0) == (client in alone)


def test_a_bad_upload_is_found_before_anything_changes() -> None:
    one, _ = server(3)
    before = one.uploads, one.read, one.round
    with pytest.raises(Exception, match="client 1"):
        one.receive([0, 1], lambda client: Disk.upload(0) if client == 0 else {}, 2)
    assert (one.uploads, one.read, one.round) == before


# ----------------------------------------------------------------------------------------------------- diagnostics


@quick
@given(count=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_sum_of_products_has_the_same_norm_as_factors_and_dense(count: int, seed: int) -> None:
    """Nine products of rank 2 in a matrix of 5 × 4 do not fit as factors."""
    generator = torch.Generator().manual_seed(seed)
    running, dense = ProductSum(), torch.zeros(5, 4, dtype=torch.float64)
    for _ in range(count):
        b, a = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((5, 2), (2, 4)))
        running.add(b, a)
        dense += b @ a
    assert running.norm2() == pytest.approx(float(dense.square().sum()), rel=1e-9)


def test_row_gap_in_groups_of_layers_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    one, disk = server(5)
    uploads = PerClient(one.uploads, disk).values()
    whole = product_gap(uploads)
    disk.reads.clear()
    monkeypatch.setattr(diagnostics, "MEMORY", 1)
    assert product_gap(uploads) == whole
    assert len(disk.reads) == 3 * 5, "once for the means, once for each of two layers"


# --------------------------------------------------------------------------------------------------------- cohorts


@pytest.mark.parametrize(
    ("config", "clients", "size"),
    [
        ({}, 8, 8),
        ({}, 1000, 1000),
        ({"cohort": 3}, 8, 3),
        ({"cohort": 100}, 8, 8),
        ({"executor": "loop", "cohort": 3}, 8, 1),
    ],
)
def test_cohort_size(config: dict[str, Any], clients: int, size: int) -> None:
    assert cohort_size(FederationConfig(**config), clients) == size


def test_cohorts_are_all_clients_in_order() -> None:
    assert [list(part) for part in cohorts(range(7), 3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_clients_are_pulled_cohort_by_cohort() -> None:
    rows = {client: examples(3, seed=client) for client in range(5)}
    model, config = AdaptedModel(llama()), training(local_epochs=1)
    shape = shape_of(METHOD, model.layer_sizes)
    pulled: list[int] = []
    states = {state.client: state for state in random_states(shape, range(5))}
    results = run_clients(
        model,
        list(rows),
        PerClient(rows, lambda client: pulled.append(client) or states[client]),
        {},
        lambda client: plans_of({client: rows[client]}, config),
        settings=round_settings(METHOD, config),
        round_=1,
        cohort=2,
    )
    assert pulled == []
    for expected in ([0, 1], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3, 4]):
        next(results)
        assert pulled == expected
    assert list(results) == []
