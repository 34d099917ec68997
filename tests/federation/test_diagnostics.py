"""product_gap and row_lora_drift against dense matrices and hand-made cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedalt.federation.diagnostics import product_gap, row_lora_drift
from fedalt.names import INDIVIDUAL, MIXER, REST_OF_WORLD, A, B, G, Key, Tensors
from support import method_of, quick, shape_of, start_states

SIZES = {"one": (7, 5), "two": (4, 6)}
R = 3


def uploads(count: int, seed: int) -> list[dict[Key, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {Key(path, INDIVIDUAL, A): (R, d) for path, (d, _) in SIZES.items()}
    shapes |= {Key(path, INDIVIDUAL, B): (o, R) for path, (_, o) in SIZES.items()}
    return [{key: torch.randn(shape, generator=generator) for key, shape in shapes.items()} for _ in range(count)]


def dense_gap(tensors: list[dict[Key, Tensor]]) -> float:
    gap = total = 0.0
    for path in SIZES:
        a = torch.stack([t[Key(path, INDIVIDUAL, A)].double() for t in tensors])
        b = torch.stack([t[Key(path, INDIVIDUAL, B)].double() for t in tensors])
        exact = (b @ a).mean(0)
        gap += float(torch.linalg.matrix_norm(exact - b.mean(0) @ a.mean(0))) ** 2
        total += float(torch.linalg.matrix_norm(exact)) ** 2
    return float((gap / total) ** 0.5)


@quick
@given(count=st.integers(2, 6), seed=st.integers(0, 999))
def test_gap_equals_the_dense_computation(count: int, seed: int) -> None:
    tensors = uploads(count, seed)
    assert product_gap(tensors) == pytest.approx(dense_gap(tensors), rel=1e-9)


def test_gap_is_zero_where_factor_means_are_exact() -> None:
    tensors = uploads(3, 0)
    assert product_gap(tensors[:1]) == 0
    common = [t | {key: tensors[0][key] for key in t if key.factor == A} for t in tensors]
    assert product_gap(common) == pytest.approx(0, abs=1e-12)


def test_no_gap_without_a_product() -> None:
    zero = [t | {key: torch.zeros_like(v) for key, v in t.items() if key.factor == B} for t in uploads(3, 0)]
    assert product_gap(zero) is None


@quick
@given(seed=st.integers(0, 999))
def test_gap_is_a_real_number_where_deviations_cancel(seed: int) -> None:
    """(B_m − B̄)(A_m − Ā) cancels in the sum over four clients, so only rounding is left, of either sign."""
    first, second, shift, _ = uploads(4, seed)
    tensors = []
    for sign_a, sign_b in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        tensors.append({k: shift[k] + (sign_a * first[k] if k.factor == A else sign_b * second[k]) for k in shift})
    gap = product_gap(tensors)
    assert isinstance(gap, float)
    assert gap < 1e-6


@pytest.mark.parametrize("drift", [0.02, 0.1])
def test_gap_orders_the_ways_to_start(drift: float) -> None:
    """Shared starts keep factor means close to product means; separate starts make them nearly orthogonal."""
    shape, gaps = shape_of(method_of("fedalt", 8), {"w": (256, 128)}, 8), {}
    for init in ("shared", "code_like", "per_client"):
        generator = torch.Generator().manual_seed(1)
        tensors = []
        for state in start_states(method_of("fedalt", 8), shape, range(8), init):
            a, b = state.tensors[Key("w", INDIVIDUAL, A)], torch.randn(128, 8, generator=generator)
            moved = a + drift * a.std() * torch.randn(a.shape, generator=generator)
            tensors.append({Key("w", INDIVIDUAL, A): moved, Key("w", INDIVIDUAL, B): b})
        gaps[init] = product_gap(tensors) or 0.0
    assert gaps["shared"] < 0.15
    assert gaps["shared"] + 0.1 < gaps["code_like"] < gaps["per_client"] - 0.1
    assert gaps["per_client"] > 0.8


def test_drift_is_the_relative_move_of_the_row_alone() -> None:
    before: Tensors = {
        Key("w", REST_OF_WORLD, A): torch.tensor([[3.0]]),
        Key("w", REST_OF_WORLD, B): torch.tensor([[4.0]]),
        Key("w", INDIVIDUAL, A): torch.tensor([[100.0]]),
        Key("w", MIXER, G): torch.tensor([[100.0]]),
    }
    after = {
        **before,
        Key("w", REST_OF_WORLD, A): torch.tensor([[3.5]]),
        Key("w", INDIVIDUAL, A): torch.tensor([[0.0]]),
    }
    assert row_lora_drift(before, after) == pytest.approx(0.5 / 5)
    assert row_lora_drift(before, before) == 0


def test_no_drift_without_a_row() -> None:
    zero = {Key("w", REST_OF_WORLD, A): torch.zeros(1, 1)}
    assert row_lora_drift(zero, {Key("w", REST_OF_WORLD, A): torch.ones(1, 1)}) is None
    individual = {Key("w", INDIVIDUAL, A): torch.ones(1, 1)}
    assert row_lora_drift(individual, individual) is None
