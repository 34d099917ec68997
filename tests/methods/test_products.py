"""Sums of products of low rank against dense matrices in NumPy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedalt.methods.algebra import factor_means, fit_b, inner, norm, stacked, truncated
from support import quick

Array = np.ndarray[Any, Any]


class Case(NamedTuple):
    """Clients' factors of one layer, and weights that add up to 1."""

    a: list[Array]
    b: list[Array]
    q: Array

    @property
    def dense(self) -> Array:
        return sum(q * b @ a for a, b, q in zip(self.a, self.b, self.q, strict=True))  # type: ignore[return-value]

    @property
    def weighted(self) -> list[Any]:
        return [(torch.tensor(a), torch.tensor(b), q) for a, b, q in zip(self.a, self.b, self.q.tolist(), strict=True)]

    @property
    def factors(self) -> dict[int, Any]:
        return {10 + i: (a, b) for i, (a, b, _) in enumerate(self.weighted)}

    def shares(self, q: Array | None = None) -> dict[int, float]:
        return {10 + i: float(value) for i, value in enumerate(self.q if q is None else q)}


def case(ranks: list[int], d: int, o: int, seed: int) -> Case:
    draw = np.random.default_rng(seed)
    q = draw.uniform(0.1, 1, len(ranks))
    a = [draw.normal(size=(r, d)) for r in ranks]
    return Case(a, [draw.normal(size=(o, r)) for r in ranks], q / q.sum())


cases = st.builds(
    case, st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 999)
)
"""Sums of ranks up to 16 beside sides from 1 to 9: often R > min(o, d)."""


def product(factors: Any) -> Array:
    a, b = factors
    return (b.double() @ a.double()).numpy()


@quick
@given(cases)
def test_a_stack_is_the_dense_sum(given_: Case) -> None:
    a, b = stacked(given_.weighted)
    assert len(a) == b.shape[1] == sum(map(len, given_.a))
    np.testing.assert_allclose(product((a, b)), given_.dense, rtol=0, atol=1e-12)


@quick
@given(cases, st.integers(1, 20))
def test_truncation_is_the_best_of_its_rank(given_: Case, rank: int) -> None:
    """Eckart and Young: its error is the root of the sum of the squares of the singular values that are left out."""
    dense = given_.dense
    u, sigma, v = np.linalg.svd(dense, full_matrices=False)
    a, b = truncated(given_.factors)(given_.shares(), rank)
    assert len(a) == b.shape[1] <= min(rank, sum(map(len, given_.a)), *dense.shape)
    error = np.linalg.norm(dense - product((a, b)))
    assert error == pytest.approx(np.sqrt((sigma[rank:] ** 2).sum()), abs=1e-10)
    np.testing.assert_allclose(product((a, b)), (u[:, :rank] * sigma[:rank]) @ v[:rank], atol=1e-8 / _gap(sigma, rank))


def _gap(sigma: Array, rank: int) -> float:
    """Singular vectors are as exact as their values are far apart."""
    return 1.0 if rank >= len(sigma) else max(float(sigma[rank - 1] - sigma[rank]), 1e-6)


@quick
@given(cases)
def test_truncation_with_enough_rank_is_the_dense_sum(given_: Case) -> None:
    factors = truncated(given_.factors)(given_.shares(), sum(map(len, given_.a)))
    np.testing.assert_allclose(product(factors), given_.dense, atol=1e-11)


@quick
@given(cases, st.integers(0, 99))
def test_one_decomposition_serves_all_weights(given_: Case, seed: int) -> None:
    """Clients without a weight are not in the sum."""
    best, draw = truncated(given_.factors), np.random.default_rng(seed)
    for left_out in range(len(given_.a)):
        q = draw.uniform(0.1, 1, len(given_.a))
        shares = given_.shares(q)
        del shares[10 + left_out]
        q[left_out] = 0
        np.testing.assert_allclose(product(best(shares, 99)), Case(given_.a, given_.b, q).dense, atol=1e-10)


@quick
@given(cases)
def test_singular_values_are_shared_out_evenly(given_: Case) -> None:
    a, b = truncated(given_.factors)(given_.shares(), 3)
    sigma = np.linalg.svd(given_.dense, compute_uv=False)[: len(a)]
    np.testing.assert_allclose(a @ a.T, np.diag(sigma), atol=1e-10)
    np.testing.assert_allclose(b.T @ b, np.diag(sigma), atol=1e-10)


def test_equal_factors_up_to_signs_give_equal_bytes() -> None:
    one = case([2, 2], 6, 5, 3)
    other = Case([-a for a in one.a], [-b for b in one.b], one.q)
    for x, y in zip(*(truncated(c.factors)(c.shares(), 2) for c in (one, other)), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("zero", ["A", "B", "both"])
def test_products_of_zero_give_zero_and_no_nan(zero: str) -> None:
    """B is zero before the first step."""
    c = case([2, 3], 6, 5, 1)
    for values in (c.a if zero != "B" else []) + (c.b if zero != "A" else []):
        values[:] = 0
    for rank in (1, 4, 9):
        assert not product(truncated(c.factors)(c.shares(), rank)).any()
    for ridge in (0.0, 0.1):
        a, b = fit_b(case_like(c, [3, 3]).weighted, ridge) if zero != "B" else fit_b(_equal(c), ridge)
        assert a.isfinite().all() and b.isfinite().all()
    assert norm(*(torch.tensor(x) for x in (c.a[0], c.b[0]))) == 0


def case_like(c: Case, ranks: list[int]) -> Case:
    """The same with A (and B, where it is) zero, of equal ranks."""
    new = case(ranks, 6, 5, 2)
    return Case([0 * a for a in new.a], [b if c.b[0].any() else 0 * b for b in new.b], new.q)


def _equal(c: Case) -> list[Any]:
    new = case([2, 2], 6, 5, 2)
    return Case(new.a, [0 * b for b in new.b], new.q).weighted


equal_ranks = st.builds(
    lambda count, r, d, o, seed: case([r] * count, d, o, seed),
    *(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(0, 999)),
)


def means(c: Case) -> tuple[Array, Array]:
    return sum(q * a for q, a in zip(c.q, c.a, strict=True)), sum(q * b for q, b in zip(c.q, c.b, strict=True))  # type: ignore[return-value]


@quick
@given(equal_ranks)
def test_factor_means(given_: Case) -> None:
    for got, expected in zip(factor_means(given_.weighted), means(given_), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-14)


@quick
@given(equal_ranks)
def test_a_fitted_b_is_that_of_least_squares_and_never_worse_than_the_mean(given_: Case) -> None:
    a, b = means(given_)
    got_a, got_b = fit_b(given_.weighted, 0.0)
    np.testing.assert_allclose(got_a, a, atol=1e-14)
    best, *_ = np.linalg.lstsq(a.T, given_.dense.T, rcond=None)  # Aᵀ Bᵀ = Pᵀ
    if len(a) <= a.shape[1]:
        np.testing.assert_allclose(got_b, best.T, atol=1e-6)
    np.testing.assert_allclose(got_b.numpy() @ a, best.T @ a, atol=1e-7)
    errors = [np.linalg.norm(given_.dense - value @ a) for value in (got_b.numpy(), b)]
    assert errors[0] <= errors[1] + 1e-9


@quick
@given(equal_ranks, st.floats(1e-3, 10))
def test_a_fitted_b_minimises_error_and_size(given_: Case, ridge: float) -> None:
    """At the minimum of ‖P − C Ā‖² + λ ‖C − B̄‖² the gradient to C is zero."""
    a, b = means(given_)
    c = fit_b(given_.weighted, ridge)[1].numpy()
    np.testing.assert_allclose((c @ a - given_.dense) @ a.T + ridge * (c - b), 0, atol=1e-10)


@quick
@given(equal_ranks)
def test_norm_and_inner_product(given_: Case) -> None:
    dense = [b @ a for a, b in zip(given_.a, given_.b, strict=True)]
    first = (torch.tensor(given_.a[0]), torch.tensor(given_.b[0]))
    last = (torch.tensor(given_.a[-1]), torch.tensor(given_.b[-1]))
    assert norm(*first) == pytest.approx(np.linalg.norm(dense[0]), rel=1e-12)
    assert inner(first, last) == pytest.approx(float((dense[0] * dense[-1]).sum()), rel=1e-9, abs=1e-10)


def test_inner_product_of_unequal_ranks() -> None:
    c = case([1, 4], 6, 5, 8)
    (a, b, _), (a2, b2, _) = c.weighted
    assert inner((a, b), (a2, b2)) == pytest.approx(float((c.b[0] @ c.a[0] * (c.b[1] @ c.a[1])).sum()), rel=1e-12)
