"""The worked example with one-by-one factors: A = (1, 2, 4), B = (2, 1, 3), W0 = 0, s = 1, as exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product
from typing import Any, Literal

import pytest
import torch
from torch import nn

from fedalt.config import FederationConfig
from fedalt.federation.diagnostics import product_gap
from fedalt.federation.server import Server
from fedalt.methods.base import Method
from fedalt.model.batch_layout import BatchContext
from fedalt.model.layer import SOFTMAX, AdaptedLinear, Placement
from fedalt.model.state import ClientState
from fedalt.names import GLOBAL, INDIVIDUAL, MERGED, MIXER, REST_OF_WORLD, A, B, G, Key, W
from support import method_of, shape_of

FACTORS_A, FACTORS_B, ROWS = (1, 2, 4), (2, 1, 3), {0: 1, 1: 1, 2: 2}
Weighting = Literal["uniform", "samples"]
ROW_VECTORS = {
    "uniform": ((Fraction(3), Fraction(2)), (Fraction(5, 2), Fraction(5, 2)), (Fraction(3, 2), Fraction(3, 2))),
    "samples": ((Fraction(10, 3), Fraction(7, 3)), (Fraction(3), Fraction(8, 3)), (Fraction(3, 2), Fraction(3, 2))),
}
ROW_PRODUCTS = {
    "uniform": (Fraction(6), Fraction(25, 4), Fraction(9, 4)),
    "samples": (Fraction(70, 9), Fraction(8), Fraction(9, 4)),
}
FEDIT_VECTORS = {
    "uniform": (Fraction(7, 3), Fraction(2), Fraction(14, 3)),
    "samples": (Fraction(11, 4), Fraction(9, 4), Fraction(99, 16)),
}
EXACT_MEAN = {"uniform": Fraction(16, 3), "samples": Fraction(7)}
EXACT_ROWS = {
    "uniform": (Fraction(7), Fraction(7), Fraction(2)),
    "samples": (Fraction(26, 3), Fraction(26, 3), Fraction(2)),
}
WEIGHTINGS: tuple[Weighting, ...] = ("uniform", "samples")


def near(value: Fraction | float) -> object:
    return pytest.approx(float(value), rel=3e-7)


def one(value: float) -> torch.Tensor:
    return torch.tensor([[float(value)]])


def federation(
    name: str, slot: str, weighting: Weighting, delivery: str = "broadcast", **settings: Any
) -> tuple[Method, Server, list[ClientState]]:
    """Three clients whose uploads have arrived."""
    method = method_of(name, **{"lora__r": 1, "lora__alpha": 1.0}, **settings)
    keys = {A: Key("w", slot, A), B: Key("w", slot, B)}
    config = FederationConfig(weighting=weighting, rest_of_world_delivery=delivery)
    server = Server(method, config, ROWS, dict.fromkeys(keys.values(), (1, 1)))
    shape = shape_of(method, {"w": (1, 1)}, 1)
    states = []
    for client, (a, b) in enumerate(zip(FACTORS_A, FACTORS_B, strict=True)):
        zeros = {key: torch.zeros(size) for key, size in shape.shapes().items()}
        state = ClientState(client, 1, zeros).with_tensors({keys[A]: one(a), keys[B]: one(b)})
        states.append(method.uploaded(state))
    uploads = {state.client: method.upload(state) for state in states}
    server.receive(uploads, uploads.__getitem__, 1)
    messages = server.messages((0, 1, 2))
    return method, server, [method.receive(state, messages[state.client]) for state in states]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_fedit_means_and_their_product(weighting: Weighting) -> None:
    a, b, y = FEDIT_VECTORS[weighting]
    _, _, states = federation("fedit", GLOBAL, weighting)
    for state in states:
        got_a, got_b = state.tensors[Key("w", GLOBAL, A)].item(), state.tensors[Key("w", GLOBAL, B)].item()
        assert (got_a, got_b) == (near(a), near(b))
        assert got_a * got_b == near(y)


@pytest.mark.parametrize(("weighting", "delivery"), list(product(WEIGHTINGS, ("broadcast", "unicast"))))
def test_fedalt_rows_and_their_products(weighting: Weighting, delivery: str) -> None:
    _, _, states = federation("fedalt", INDIVIDUAL, weighting, delivery)
    for state, (a, b), y in zip(states, ROW_VECTORS[weighting], ROW_PRODUCTS[weighting], strict=True):
        got_a, got_b = (
            state.tensors[Key("w", REST_OF_WORLD, A)].item(),
            state.tensors[Key("w", REST_OF_WORLD, B)].item(),
        )
        assert (got_a, got_b) == (near(a), near(b))
        assert got_a * got_b == near(y)


def test_row_gap_is_the_share_of_the_product_mean_that_factor_means_miss() -> None:
    _, server, _ = federation("fedalt", INDIVIDUAL, "uniform")
    exact, factor = Fraction(16, 3), Fraction(14, 3)
    assert product_gap([server.read(client) for client in server.uploads]) == near((exact - factor) / exact)


@pytest.mark.parametrize(
    ("row_logit", "expected"), [(0.0, Fraction(4)), (math.log(3), Fraction(5))], ids=["G=0", "G=(row: ln 3)"]
)
def test_fedalt_forward_of_client_0(row_logit: float, expected: Fraction) -> None:
    method, _, states = federation("fedalt", INDIVIDUAL, "uniform")
    mixer = torch.zeros(2, 1)
    mixer[shape_of(method, {}, 1).slots.index(REST_OF_WORLD)] = row_logit
    state = states[0].with_tensors({Key("w", MIXER, G): mixer})
    assert forward(state, Placement((INDIVIDUAL, REST_OF_WORLD), SOFTMAX, 1.0, 0.0)) == near(expected)


def forward(state: ClientState, placement: Placement) -> float:
    """What the layer makes of x = 1 over W0 = 0."""
    base = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(base.weight)
    layer = AdaptedLinear(base, "w", 0, BatchContext())
    layer.place(placement, {key: value[None] for key, value in state.tensors.items()}, ())
    return float(layer(torch.ones(1, 1, 1)).item())


def rows_of(states: list[ClientState]) -> list[float]:
    return [(s.tensors[Key("w", REST_OF_WORLD, B)] @ s.tensors[Key("w", REST_OF_WORLD, A)]).item() for s in states]


@pytest.mark.parametrize("aggregator", ["stack", "svd"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_exact_rows(weighting: Weighting, aggregator: str) -> None:
    _, _, states = federation("fedalt", INDIVIDUAL, weighting, fedalt__rest_of_world_aggregator=aggregator)
    assert rows_of(states) == [near(y) for y in EXACT_ROWS[weighting]]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_fitted_rows_without_ridge_are_exact(weighting: Weighting) -> None:
    _, _, states = federation("fedalt_fair", INDIVIDUAL, weighting, fedalt__ridge=0.0)
    assert rows_of(states) == [near(y) for y in EXACT_ROWS[weighting]]
    means = [s.tensors[Key("w", REST_OF_WORLD, A)].item() for s in states]
    assert means == [near(a) for a, _ in ROW_VECTORS[weighting]], "A is the factor mean still"


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_hetlora_weighs_by_the_size_of_products(weighting: Weighting) -> None:
    """Products 2, 2, 12 of sum 16: weights 1/8, 1/8, 3/4 whatever the numbers of rows."""
    _, _, states = federation("hetlora", GLOBAL, weighting)
    for state in states:
        assert state.tensors[Key("w", GLOBAL, A)].item() == near(Fraction(27, 8))
        assert state.tensors[Key("w", GLOBAL, B)].item() == near(Fraction(21, 8))


@pytest.mark.parametrize(
    ("weighting", "correction"), [("uniform", Fraction(2, 7)), ("samples", Fraction(13, 44))], ids=WEIGHTINGS
)
def test_lora_fair_without_ridge(weighting: Weighting, correction: Fraction) -> None:
    settings = {"lora_fair__solver": "ridge", "lora_fair__weight": 0.0}
    _, _, states = federation("lora_fair", GLOBAL, weighting, **settings)
    mean_a, mean_b, _ = FEDIT_VECTORS[weighting]
    for state in states:
        a, b = state.tensors[Key("w", GLOBAL, A)].item(), state.tensors[Key("w", GLOBAL, B)].item()
        assert (a, b) == (near(mean_a), near(mean_b + correction))
        assert a * b == near(EXACT_MEAN[weighting])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_lora_fair_by_cosine_sees_no_size_and_corrects_nothing(weighting: Weighting) -> None:
    """Two positive numbers always have cosine 1."""
    _, _, states = federation("lora_fair", GLOBAL, weighting)
    mean_a, mean_b, _ = FEDIT_VECTORS[weighting]
    assert states[0].tensors[Key("w", GLOBAL, A)].item() == near(mean_a)
    assert states[0].tensors[Key("w", GLOBAL, B)].item() == near(mean_b)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_flexlora_and_flora_mean_products_exactly(weighting: Weighting) -> None:
    _, _, states = federation("flexlora", GLOBAL, weighting)
    for state in states:
        a, b = state.tensors[Key("w", GLOBAL, A)].item(), state.tensors[Key("w", GLOBAL, B)].item()
        assert abs(a) == near(1), "all of the singular value is on B"
        assert a * b == near(EXACT_MEAN[weighting])
    _, _, states = federation("flora", GLOBAL, weighting)
    assert [state.tensors[Key("w", MERGED, W)].item() for state in states] == [near(EXACT_MEAN[weighting])] * 3


@pytest.mark.parametrize(
    ("aggregator", "expected"),
    [
        ("stack", (Fraction(16, 3), Fraction(16, 3), Fraction(16, 3))),
        ("factor_mean", (Fraction(14, 3), Fraction(29, 6), Fraction(11, 2))),
    ],
)
def test_fixed_alpha_of_one_over_k(aggregator: str, expected: tuple[Fraction, ...]) -> None:
    """With exact rows it is the mean of products for every client."""
    settings = {"fedalt__rest_of_world_aggregator": aggregator}
    method, _, states = federation("fedalt_fixed_one_over_k", INDIVIDUAL, "uniform", **settings)
    placement = Placement(method.slot_names, method.mixing, 1.0, 0.0)
    assert [forward(state, placement) for state in states] == [near(y) for y in expected]
