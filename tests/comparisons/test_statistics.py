"""Intervals, paired tests, margins, Holm, verdicts, sources of variance, against SciPy and numbers by hand."""

from __future__ import annotations

from math import sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from fedalt.comparisons.statistics import (
    Paired,
    against,
    beyond,
    by_client,
    half_width,
    holm,
    judge,
    paired,
    sources,
    verdict,
)
from support import quick

# ------------------------------------------------------------------------------------------------------------ intervals


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 3.0], 12.706204736432095 * sqrt(2) / sqrt(2)),
        ([1.0, 2.0, 3.0], 4.302652729911275 / sqrt(3)),
        ([5.0, 5.0, 5.0], 0.0),
    ],
)
def test_half_of_the_interval_by_the_t_table(values: list[float], expected: float) -> None:
    assert half_width(values) == pytest.approx(expected, rel=1e-9)


def test_one_seed_has_no_interval() -> None:
    assert half_width([4.2]) is None


# -------------------------------------------------------------------------------------------------------- paired tests

FEW = [-3.0, 1.0, 4.0, 1.5, 5.0, 9.0, 2.0, 6.0]


@pytest.mark.parametrize("differences", [FEW, [0.1, -0.2, 0.05], [float(i % 7 - 2) for i in range(24)]])
@pytest.mark.parametrize("margin", [0.5, 3.0])
def test_p_values_are_those_of_scipy(differences: list[float], margin: float) -> None:
    test = paired(differences, margin)
    above, below = (
        ttest_1samp(differences, bound, alternative=side).pvalue
        for bound, side in ((-margin, "greater"), (margin, "less"))
    )
    assert test.p == pytest.approx(ttest_1samp(differences, 0).pvalue, rel=1e-9)
    assert test.p_equivalent == pytest.approx(max(above, below), rel=1e-9)
    assert test.p_not_worse == pytest.approx(above, rel=1e-9)
    assert paired(differences, margin, higher_is_better=False).p_not_worse == pytest.approx(below, rel=1e-9)
    assert (test.difference, test.ci95, test.clients) == (
        pytest.approx(sum(differences) / len(differences)),
        pytest.approx(half_width(differences)),
        len(differences),
    )


def test_no_difference_at_all() -> None:
    """0.1 + 0.2 is not 0.3 in a computer; that is no difference either."""
    assert paired([0.0] * 8, 1.0) == Paired(0.0, 0.0, 1.0, 0.0, 0.0, 8)
    assert paired([0.1 + 0.2 - 0.3, 0.0]) == Paired(0.0, 0.0, 1.0, None, None, 2)
    assert paired([2.0] * 3, 1.0) == Paired(2.0, 0.0, 0.0, 1.0, 0.0, 3)


def test_one_client_is_no_test() -> None:
    assert paired([7.0], 1.0) == Paired(7.0, None, None, None, None, 1)


scores = st.lists(st.integers(-400, 400).map(lambda n: n / 4), min_size=2, max_size=12)


@quick
@given(scores)
def test_swapping_the_sides_swaps_the_sign_only(differences: list[float]) -> None:
    one, other = paired(differences, 1.0), paired([-difference for difference in differences], 1.0)
    assert one.p is not None
    assert 0 <= one.p <= 1
    assert (one.p, one.ci95, one.p_equivalent) == tuple(map(pytest.approx, (other.p, other.ci95, other.p_equivalent)))
    assert one.difference == pytest.approx(-other.difference)


@quick
@given(scores)
def test_the_interval_says_what_p_says(differences: list[float]) -> None:
    test = paired(differences)
    assert test.p is not None and test.ci95 is not None
    if abs(abs(test.difference) - test.ci95) > 1e-6:
        assert (test.p < 0.05) is (abs(test.difference) > test.ci95)


# ----------------------------------------------------------------------------------------------------------------- Holm


def test_holm_by_hand() -> None:
    """4 x .01 = .04; 3 x .02 = .06; 2 x .025 = .05 is raised to .06; 1 x .9 = .9."""
    adjusted = holm({"a": 0.9, "b": 0.02, "c": 0.01, "d": 0.025})
    assert adjusted == {"a": 0.9, "b": pytest.approx(0.06), "c": pytest.approx(0.04), "d": pytest.approx(0.06)}
    assert list(adjusted) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("values", "expected"), [({}, {}), ({"a": 0.03}, {"a": 0.03}), ({"a": 0.6, "b": 0.7}, {"a": 1, "b": 1})]
)
def test_holm_of_few(values: dict[str, float], expected: dict[str, float]) -> None:
    assert holm(values) == expected


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_raises_and_keeps_the_order(values: list[float]) -> None:
    names = {str(i): p for i, p in enumerate(values)}
    adjusted = holm(names)
    for name, p in names.items():
        assert p <= adjusted[name] <= min(1.0, len(values) * p)
        assert all(adjusted[name] <= adjusted[other] for other, q in names.items() if p < q)


# ------------------------------------------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("difference", "p", "p_equivalent", "p_not_worse", "expected"),
    [
        (2.0, 0.01, None, None, "better"),
        (-2.0, 0.01, None, None, "worse"),
        (2.0, 0.05, None, None, "undecided"),
        (0.4, 0.01, 0.01, 0.01, "equivalent"),
        (2.0, 0.3, 0.5, 0.01, "not worse"),
        (2.0, 0.01, 0.9, 0.01, "better"),
        (2.0, None, None, None, "undecided"),
    ],
)
def test_a_verdict(
    difference: float, p: float | None, p_equivalent: float | None, p_not_worse: float | None, expected: str
) -> None:
    assert verdict(Paired(difference, 1.0, p, p_equivalent, p_not_worse, 8)) == expected


def test_losses_are_better_when_lower() -> None:
    assert verdict(Paired(-2.0, 1.0, 0.01, None, None, 8), higher_is_better=False) == "better"


def test_many_methods_need_a_smaller_p() -> None:
    """Enough alone, not as one of two: each question is a family of its own."""
    one = paired([0.1, 2.0, 3.0, 0.2, 2.5, 0.3, 1.0, -0.4])
    assert one.p is not None and 0.01 < one.p < 0.025 * 2
    assert judge({"a": one})["a"]["verdict"] == "better"
    both = judge({"a": one, "b": one})
    assert both["a"]["p_adjusted"] == pytest.approx(2 * one.p)
    assert both["a"]["verdict"] == ("better" if 2 * one.p < 0.05 else "undecided")


def cells(draws: int, clients: int, seeds: int, sizes: tuple[float, float, float], seed: int = 0) -> np.ndarray:
    """Differences with a part of every client (in its draw), of every draw of a client, and of every run."""
    rng = np.random.default_rng(seed)
    parts = ((1, clients, 1), (draws, clients, 1), (draws, clients, seeds))
    total = sum(size * rng.standard_normal(part) for size, part in zip(sizes, parts, strict=True))
    return np.broadcast_to(total, (draws, clients, seeds))


def test_seeds_and_draws_are_no_further_clients() -> None:
    found = against({"a": cells(3, 8, 5, (2.0, 0.5, 0.5))}, margin=1.0)["a"]
    assert found["clients"] == 8
    assert by_client(np.arange(12.0).reshape(2, 3, 2)) == [3.5, 5.5, 7.5]
    assert by_client(np.arange(12.0).reshape(2, 3, 2), dealt=True) == [0.5, 2.5, 4.5, 6.5, 8.5, 10.5]


def test_one_client_decides_nothing() -> None:
    values = np.zeros((1, 8, 1))
    values[0, 0] = 50.0
    assert against({"a": values}, margin=1.0)["a"]["verdict"] == "undecided"


def test_sources_of_variance_are_found() -> None:
    found = sources(cells(40, 200, 10, (3.0, 2.0, 1.0)))
    assert list(found) == ["clients", "draws", "seeds"]
    assert found == {name: pytest.approx(sd, rel=0.15) for name, sd in zip(found, (3.0, 2.0, 1.0), strict=True)}
    assert sources(cells(1, 8, 1, (3.0, 0.0, 0.0))).keys() == {"clients"}
    apart = 2.0 * np.random.default_rng(0).standard_normal((60, 1, 1)) + cells(60, 50, 2, (0.0, 1.0, 0.5))
    assert sources(apart, dealt=True) == {
        "clients": pytest.approx(1.0, rel=0.2),
        "draws": pytest.approx(2.0, rel=0.2),
        "seeds": pytest.approx(0.5, rel=0.2),
    }


def test_beyond_these_rows_is_wider() -> None:
    """A part that all clients of a draw share is no matter of clients, but of other draws it is."""
    rng = np.random.default_rng(3)
    shared = np.broadcast_to(3 * rng.standard_normal((4, 1, 1)), (4, 8, 2)) + 0.1 * rng.standard_normal((4, 8, 2))
    for dealt in (False, True):
        bounds = beyond(shared, dealt)
        assert bounds is not None
        assert (bounds[1] - bounds[0]) / 2 > 4 * float(half_width(by_client(shared)) or 0)
    assert beyond(np.ones((1, 1, 1))) is None
    assert beyond(np.full((2, 3, 2), 4.0)) == [pytest.approx(4.0)] * 2


def test_the_bootstraps_variance_is_that_of_the_mean() -> None:
    """Of one draw and one seed: s² / n, not the (n − 1) / n of it that n drawn with replacement have."""
    values = np.array(FEW)
    bounds = beyond(values.reshape(1, -1, 1))
    assert bounds is not None
    assert (bounds[1] - bounds[0]) / 2 == pytest.approx(1.96 * values.std(ddof=1) / sqrt(len(FEW)), rel=0.1)
