"""Leave-one-out means: broadcast with subtraction, unicast, and the literal sum agree, whoever takes part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedalt.config import FederationConfig
from fedalt.errors import UserError
from fedalt.federation.client import finite
from fedalt.federation.server import Server
from fedalt.methods.algebra import WeightedSum
from fedalt.methods.base import Message, Method
from fedalt.model.state import AdapterShape, ClientState
from fedalt.names import GLOBAL, INDIVIDUAL, REST_OF_WORLD, A, B, Key, Tensors
from oracle.reference import mean_of_others
from support import bitwise, distance, method_of, quick, shape_of

LAYERS = {"x.one": (6, 4), "x.two": (4, 8)}
R = 3
DELIVERIES = ("broadcast", "unicast")


class Federation:
    """FedALT without training: in every round some clients upload random factors."""

    def __init__(
        self, clients: int, samples: Sequence[int] | None = None, method: str = "fedalt", **config: Any
    ) -> None:
        self.method: Method = method_of(method, clients)
        self.shape: AdapterShape = shape_of(self.method, LAYERS, R)
        shared = {key: size for key, size in self.shape.shapes().items() if self.method.shares(key)}
        rows = dict(enumerate(samples or [1] * clients))
        self.server = Server(self.method, FederationConfig(**config), rows, shared)
        zeros = {key: torch.zeros(size) for key, size in self.shape.shapes().items()}
        self.states = {client: ClientState(client, 0, zeros) for client in range(clients)}
        self.uploads: dict[int, Tensors] = {}

    def upload(self, clients: Sequence[int], round_: int, seed: int = 0) -> None:
        """Some clients train, that is get new random factors, and upload them."""
        for client in clients:
            generator = torch.Generator().manual_seed(10_000 * seed + 100 * round_ + client)
            state = self.states[client]
            new = {k: torch.randn(v.shape, generator=generator) for k, v in self.method.upload(state).items()}
            self.states[client] = self.method.uploaded(replace(state.with_tensors(new), round=round_))
        self.receive({c: self.method.upload(self.states[c]) for c in clients}, round_)

    def receive(self, arrived: Mapping[int, Tensors], round_: int) -> None:
        """Whoever keeps the uploads adds the new ones; the server is told where to read."""
        uploads = {**self.uploads, **arrived}
        self.server.receive(arrived, uploads.__getitem__, round_)
        self.uploads = uploads

    def install(self) -> None:
        messages = self.server.messages(tuple(self.states))
        for client, message in messages.items():
            self.states[client] = self.method.receive(self.states[client], message)

    def row(self, client: int) -> dict[Key, torch.Tensor]:
        """A client's row, with the keys of the individuals it is the mean of."""
        tensors = self.states[client].tensors
        return {key._replace(slot=INDIVIDUAL): value for key, value in tensors.items() if key.slot == REST_OF_WORLD}

    def literal_row(self, client: int, uploads: Mapping[int, Tensors], weights: Mapping[int, float]) -> Tensors:
        arrays = {c: {key: value.numpy() for key, value in tensors.items()} for c, tensors in uploads.items()}
        return {key: torch.from_numpy(v).float() for key, v in mean_of_others(arrays, client, weights).items()}

    def sent(self) -> dict[int, Tensors]:
        return {client: state.sent for client, state in self.states.items() if state.sent is not None}


@quick
@given(
    samples=st.lists(st.integers(1, 9), min_size=2, max_size=8),
    weighting=st.sampled_from(["method", "uniform", "samples"]),
    seed=st.integers(0, 99),
)
def test_broadcast_unicast_and_literal_mean_agree(samples: list[int], weighting: str, seed: int) -> None:
    """The fp32 rounding of a broadcast mean is amplified by 1/(1−p), at most 2 with uniform weights."""
    weights = dict(enumerate(samples if weighting == "samples" else [1] * len(samples)))
    for delivery in DELIVERIES:
        federation = Federation(len(samples), samples, weighting=weighting, rest_of_world_delivery=delivery)
        federation.upload(range(len(samples)), 1, seed)
        federation.install()
        for client, weight in weights.items():
            limit = 1e-6 * max(1, 0.5 * sum(weights.values()) / (sum(weights.values()) - weight))
            expected = federation.literal_row(client, federation.sent(), weights)
            assert distance(federation.row(client), expected) < limit


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_row_is_independent_of_the_clients_own_upload(delivery: str) -> None:
    one, other = (Federation(4, rest_of_world_delivery=delivery) for _ in range(2))
    one.upload(range(4), 1)
    other.upload(range(4), 1)
    other.upload([2], 1, seed=77)  # client 2 sent something else
    for federation in (one, other):
        federation.install()
    assert distance(one.row(2), other.row(2)) < (1e-6 if delivery == "broadcast" else 1e-30)
    assert all(distance(one.row(k), other.row(k)) > 0.1 for k in (0, 1, 3))


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_rows_and_individuals_have_the_same_sum(delivery: str) -> None:
    federation = Federation(5, rest_of_world_delivery=delivery)
    federation.upload(range(5), 1)
    federation.install()
    for key in federation.row(0):
        rows = sum(federation.row(k)[key] for k in range(5))
        torch.testing.assert_close(rows, sum(s[key] for s in federation.sent().values()), rtol=1e-5, atol=1e-5)


def test_a_client_outside_the_mean_takes_it_as_it_is() -> None:
    federation = Federation(4)
    federation.upload([0, 1, 3], 1)
    federation.install()
    assert bitwise(federation.row(2), federation.server.mean())


def test_a_client_subtracts_what_it_sent_and_not_what_it_has_become() -> None:
    federation = Federation(3)
    federation.upload(range(3), 1)
    message = federation.server.messages((0,))[0]
    state = federation.states[0]
    moved = state.with_tensors({key: value + 1 for key, value in federation.method.upload(state).items()})
    rows = [federation.method.receive(s, message).tensors for s in (state, moved)]
    assert all(torch.equal(rows[0][key], rows[1][key]) for key in rows[0] if key.slot == REST_OF_WORLD)


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_a_federation_of_one_has_no_row(delivery: str) -> None:
    federation = Federation(1, rest_of_world_delivery=delivery)
    assert {key.slot for key in federation.shape.shapes()} == {INDIVIDUAL}
    federation.upload([0], 1)
    before = federation.states[0]
    federation.install()
    assert federation.states[0] is before


@pytest.mark.parametrize("delivery", DELIVERIES)
def test_alone_in_a_round_of_participants_keeps_the_previous_row(delivery: str) -> None:
    federation = Federation(3, rest_of_world_participation="participants", rest_of_world_delivery=delivery)
    federation.upload(range(3), 1)
    federation.install()
    before = federation.row(0)
    federation.upload([0], 2)
    federation.install()
    assert bitwise(federation.row(0), before)
    assert all(bitwise(federation.row(k), federation.sent()[0]) for k in (1, 2))


PARTICIPATION = {
    "participants": {0: 1.0, 3: 1.0},
    "last_known": {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0},
    "staleness_decay": {0: 1.0, 1: 0.5, 2: 0.25, 3: 1.0},
}


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("rule", PARTICIPATION)
def test_rows_under_partial_participation(rule: str, delivery: str) -> None:
    """Round 1: 0, 1, 2. Round 2: 1. Round 3: 0 and 3. Client 4 never takes part and takes the whole mean."""
    federation = Federation(5, rest_of_world_participation=rule, staleness_decay=0.5, rest_of_world_delivery=delivery)
    for round_, clients in enumerate(([0, 1, 2], [1], [0, 3]), 1):
        federation.upload(clients, round_)
    federation.install()
    weights = PARTICIPATION[rule]
    assert federation.server.weights() == weights
    counted = {client: federation.sent()[client] for client in weights}
    for client in range(5):
        expected = federation.literal_row(client, counted, weights)
        assert distance(federation.row(client), expected) < 1e-6


def test_staleness_without_decay_is_last_known() -> None:
    rows = []
    for config in (
        {"rest_of_world_participation": "last_known"},
        {"rest_of_world_participation": "staleness_decay", "staleness_decay": 1.0},
    ):
        federation = Federation(3, **config)
        federation.upload(range(3), 1)
        federation.upload([1], 2)
        federation.install()
        rows.append([federation.row(k) for k in range(3)])
    assert all(bitwise(one, other) for one, other in zip(*rows, strict=True))


@pytest.mark.parametrize("decay", [0.1, 1e-3, 1e-60])
def test_row_of_a_client_that_dominates_the_mean(decay: float) -> None:
    """After six rounds alone its share is 1 − decay⁶ or so, and subtraction in fp32 would leave mostly rounding."""
    rows = []
    for delivery in DELIVERIES:
        federation = Federation(
            2, rest_of_world_participation="staleness_decay", staleness_decay=decay, rest_of_world_delivery=delivery
        )
        federation.upload(range(2), 1)
        for round_ in range(2, 8):
            federation.upload([0], round_)
        federation.install()
        rows.append(federation.row(0))
    assert distance(*rows) < 1e-5


@pytest.mark.parametrize("name", ["fedalt", "fedit"])
def test_a_round_in_which_nobody_delivered_changes_nothing(name: str) -> None:
    federation = Federation(3, method=name)
    assert federation.server.messages((0, 1, 2)) == {}
    federation.upload(range(3), 1)
    mean = federation.server.mean()
    federation.receive({}, 2)
    assert bitwise(federation.server.mean(), mean)
    assert federation.server.round == 2


def test_fedit_averages_the_participants_of_the_round_by_their_rows() -> None:
    federation = Federation(3, samples=(1, 2, 5), method="fedit", rest_of_world_participation="last_known")
    federation.upload(range(3), 1)
    federation.upload([0, 2], 2)
    federation.install()
    sent = federation.sent()
    for client in range(3):
        tensors = federation.states[client].tensors
        expected = {key: (sent[0][key].double() + 5 * sent[2][key].double()) / 6 for key in tensors}
        assert {key.slot for key in tensors} == {GLOBAL}
        assert distance(tensors, expected) < 1e-6


def test_order_of_arrival_does_not_matter() -> None:
    """With values like these even fp64 sums depend on their order."""
    means = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        federation = Federation(3)
        values = {0: 1e30, 1: 1.0, 2: -1e30}
        uploads = {c: {k: torch.full(size, values[c]) for k, size in federation.server.shapes.items()} for c in order}
        federation.receive(uploads, 1)
        means.append(federation.server.mean())
    assert bitwise(means[0], means[1])
    assert bitwise(means[0], means[2])


KEY = Key("x.one", INDIVIDUAL, A)


def broken(kind: str, tensors: dict[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
    if kind == "missing key":
        return {key: value for key, value in tensors.items() if key != KEY}
    if kind == "extra key":
        return tensors | {Key("x.one", REST_OF_WORLD, A): torch.zeros(R, 6)}
    wrong = {
        "shape": torch.zeros(R + 1, 6),
        "transposed": torch.zeros(6, R),
        "NaN": torch.full((R, 6), torch.nan),
        "infinity": torch.full((R, 6), torch.inf),
        "half precision": torch.zeros(R, 6, dtype=torch.float16),
        "integers": torch.zeros(R, 6, dtype=torch.int64),
    }
    return tensors | {KEY: wrong[kind]}


@pytest.mark.parametrize(
    "kind", ["missing key", "extra key", "shape", "transposed", "NaN", "infinity", "half precision", "integers"]
)
def test_a_bad_upload_names_the_client_and_leaves_the_server_as_it_was(kind: str) -> None:
    federation = Federation(3)
    federation.upload(range(3), 1)
    before = federation.server.mean()
    good = dict(federation.method.upload(federation.states[0]))
    with pytest.raises(UserError, match=r"client 1: .*x\.one"):
        federation.receive({0: {k: v + 1 for k, v in good.items()}, 1: broken(kind, good)}, 2)
    assert bitwise(federation.server.mean(), before)


@quick
@given(weights=st.lists(st.integers(1, 9), min_size=2, max_size=6), order=st.randoms(use_true_random=False))
def test_weighted_sums_add_up_in_any_order(weights: list[int], order: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    uploads = [({KEY: torch.randn(R, 6, generator=generator)}, float(w)) for w in weights]
    whole, shuffled, left, right = (WeightedSum() for _ in range(4))
    for i, upload in enumerate(uploads):
        whole.add(*upload)
        (left if i % 2 else right).add(*upload)
    order.shuffle(uploads)
    for upload in uploads:
        shuffled.add(*upload)
    for total, weight in (
        (shuffled.total[KEY], shuffled.weight),
        (left.total[KEY] + right.total[KEY], left.weight + right.weight),
    ):
        assert weight == whole.weight
        torch.testing.assert_close(total, whole.total[KEY], rtol=1e-13, atol=1e-13)
    literal = sum(w * tensors[KEY].double() for tensors, w in uploads) / sum(weights)
    torch.testing.assert_close(whole.mean()[KEY], literal.float(), rtol=1e-6, atol=1e-7)  # type: ignore[union-attr]


def test_a_mean_of_nothing_is_an_error() -> None:
    empty, weightless = WeightedSum(), WeightedSum()
    weightless.add({KEY: torch.ones(R, 6)}, 0.0)
    for each in (empty, weightless):
        with pytest.raises(ZeroDivisionError):
            each.mean()


def test_install_touches_the_row_alone() -> None:
    federation = Federation(3)
    federation.upload(range(3), 1)
    state = federation.states[1]
    mean = {key: torch.ones(size) for key, size in federation.server.shapes.items()}
    after = federation.method.receive(state, Message(mean, 0.0)).tensors
    for key, value in after.items():
        assert (value is state.tensors[key]) == (key.slot != REST_OF_WORLD)
    assert float(after[Key("x.one", REST_OF_WORLD, B)].min()) == 1


@pytest.mark.parametrize(
    ("values", "so"),
    [([3e38, 3e38], True), ([1.0, torch.inf], False), ([torch.inf, -torch.inf], False), ([0.0, torch.nan], False)],
)
def test_finite_looks_at_every_number_even_where_their_sum_is_too_large(values: list[float], so: bool) -> None:
    assert finite(torch.tensor(values)) is so
