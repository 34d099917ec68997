"""The worked example with one-by-one factors: A = (1, 2, 4), B = (2, 1, 3), W0 = 0, s = 1, as exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product
from typing import Literal

import pytest
import torch
from torch import nn

from fedalt.config import FederationConfig
from fedalt.federation.diagnostics import row_gap
from fedalt.federation.server import Server
from fedalt.methods.base import Method
from fedalt.model.layer import AdaptedLinear, Placement
from fedalt.model.mixing import SOFTMAX
from fedalt.model.rowmap import RowContext
from fedalt.model.state import ClientState
from fedalt.names import GLOBAL, INDIVIDUAL, MIXER, ROW, A, B, G, Key
from support import method_of

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


def near(value: Fraction | float) -> object:
    return pytest.approx(float(value), rel=3e-7)


def one(value: float) -> torch.Tensor:
    return torch.tensor([[float(value)]])


def federation(name: str, slot: str, weighting: Weighting, delivery: str = "broadcast") -> tuple[Method, Server, list]:
    """Three clients whose uploads have arrived."""
    method = method_of(name)
    keys = {A: Key("w", slot, A), B: Key("w", slot, B)}
    config = FederationConfig(weighting=weighting, row_delivery=delivery)
    server = Server(method, config, ROWS, dict.fromkeys(keys.values(), (1, 1)))
    shape = method.shape(1, {"w": (1, 1)})
    states = []
    for client, (a, b) in enumerate(zip(FACTORS_A, FACTORS_B, strict=True)):
        zeros = {key: one(0) for key in shape.shapes()}
        state = ClientState(client, 1, zeros).with_tensors({keys[A]: one(a), keys[B]: one(b)})
        states.append(method.sent(state))
    uploads = {state.client: method.upload(state) for state in states}
    server.receive(uploads, uploads.__getitem__, 1)
    messages = server.messages((0, 1, 2))
    return method, server, [method.install(state, messages[state.client]) for state in states]


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
def test_fedit_means_and_their_product(weighting: Weighting) -> None:
    a, b, y = FEDIT_VECTORS[weighting]
    _, _, states = federation("fedit", GLOBAL, weighting)
    for state in states:
        got_a, got_b = state.tensors[Key("w", GLOBAL, A)].item(), state.tensors[Key("w", GLOBAL, B)].item()
        assert (got_a, got_b) == (near(a), near(b))
        assert got_a * got_b == near(y)


@pytest.mark.parametrize(("weighting", "delivery"), list(product(("uniform", "samples"), ("broadcast", "unicast"))))
def test_fedalt_rows_and_their_products(weighting: Weighting, delivery: str) -> None:
    _, _, states = federation("fedalt", INDIVIDUAL, weighting, delivery)
    for state, (a, b), y in zip(states, ROW_VECTORS[weighting], ROW_PRODUCTS[weighting], strict=True):
        got_a, got_b = state.tensors[Key("w", ROW, A)].item(), state.tensors[Key("w", ROW, B)].item()
        assert (got_a, got_b) == (near(a), near(b))
        assert got_a * got_b == near(y)


def test_row_gap_is_the_share_of_the_product_mean_that_factor_means_miss() -> None:
    _, server, _ = federation("fedalt", INDIVIDUAL, "uniform")
    exact, factor = Fraction(16, 3), Fraction(14, 3)
    assert row_gap([server.read(client) for client in server.uploads]) == near((exact - factor) / exact)


@pytest.mark.parametrize(
    ("row_logit", "expected"), [(0.0, Fraction(4)), (math.log(3), Fraction(5))], ids=["G=0", "G=(row: ln 3)"]
)
def test_fedalt_forward_of_client_0(row_logit: float, expected: Fraction) -> None:
    method, _, states = federation("fedalt", INDIVIDUAL, "uniform")
    mixer = torch.zeros(2, 1)
    mixer[method.shape(1, {}).slots.index(ROW)] = row_logit
    state = states[0].with_tensors({Key("w", MIXER, G): mixer})
    base = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(base.weight)
    layer = AdaptedLinear(base, "w", 0, RowContext())
    layer.place(Placement((INDIVIDUAL, ROW), SOFTMAX, 1.0, 0.0), {k: v[None] for k, v in state.tensors.items()}, ())
    assert layer(torch.ones(1, 1, 1)).item() == near(expected)
