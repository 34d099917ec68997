"""Intervals, signed ranks, Holm and verdicts, against numbers from tables, enumeration and hand."""

from __future__ import annotations

from itertools import product
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedalt.comparisons.statistics import Paired, against, half_width, holm, paired, verdict
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


# --------------------------------------------------------------------------------------------------------- signed ranks

TIED = [-3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0, 5.0, 3.0]


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1, 2, 3, 4, 5, 6], 2 / 2**6),
        ([-1, -2, -3, -4, -5, -6], 2 / 2**6),
        ([1, 2, 3, 4, 5, -6], 28 / 2**6),
        ([1, 2, 3, 4, 5], 2 / 2**5),
        ([2, 2, 2, 2], 2 / 2**4),
        ([0, 0, 1, 2, 3, 4, 5, 6], 2 / 2**6),
        (TIED, 0.017578125),
        ([0.5 * i - 3.25 for i in range(24)], 0.005324615223318874),
        ([float(i % 7 - 2) or 1.0 for i in range(24)], 0.0556653410023646),
    ],
)
def test_p_values(differences: list[float], p: float) -> None:
    test = paired(differences)
    assert test.p == pytest.approx(p, rel=1e-9)
    assert test.pairs == len(differences)
    assert test.difference == pytest.approx(sum(differences) / len(differences))
    assert test.ci95 == pytest.approx(half_width(differences))


def test_ties_are_enumerated() -> None:
    """Every choice of signs is as likely as any; ranks of equal sizes are their mean."""
    sizes = sorted(map(abs, TIED))
    ranks = [(sizes.index(abs(d)) + 1 + sizes.index(abs(d)) + sizes.count(abs(d))) / 2 for d in TIED]
    seen = abs(sum(rank * (1 if d > 0 else -1) for rank, d in zip(ranks, TIED, strict=True)))
    sums = [abs(sum(s * rank for s, rank in zip(signs, ranks, strict=True))) for signs in product((1, -1), repeat=10)]
    assert paired(TIED).p == pytest.approx(sum(one >= seen for one in sums) / len(sums))


def test_no_difference_at_all() -> None:
    assert paired([0.0] * 8) == Paired(0.0, 0.0, 1.0, 8)


def test_rounding_is_no_difference() -> None:
    """0.1 + 0.2 is not 0.3 in a computer; two clients that gain the same tie."""
    assert paired([0.1 + 0.2 - 0.3, 0.0]) == Paired(0.0, 0.0, 1.0, 2)
    assert paired([1.1 - 1.0, 0.1, 0.3, 0.4, 0.5, 0.6]).p == paired([0.1, 0.1, 0.3, 0.4, 0.5, 0.6]).p


def test_one_pair_is_no_test() -> None:
    assert paired([7.0]) == Paired(7.0, None, None, 1)


scores = st.lists(st.integers(-400, 400).map(lambda n: n / 4), min_size=2, max_size=12)


@quick
@given(scores)
def test_swapping_the_sides_swaps_the_sign_only(differences: list[float]) -> None:
    one, other = paired(differences), paired([-difference for difference in differences])
    assert one.p is not None
    assert 0 < one.p <= 1
    assert (one.p, one.ci95, one.pairs) == (pytest.approx(other.p), pytest.approx(other.ci95), other.pairs)
    assert one.difference == pytest.approx(-other.difference)


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
    ("difference", "ci95", "adjusted", "expected"),
    [
        (2.0, 1.0, 0.01, "better"),
        (-2.0, 1.0, 0.01, "worse"),
        (2.0, 1.0, 0.05, "tie"),
        (2.0, 2.0, 0.01, "tie"),
        (-1.0, 2.0, 0.01, "tie"),
        (2.0, None, None, "tie"),
    ],
)
def test_a_verdict_needs_both(difference: float, ci95: float | None, adjusted: float | None, expected: str) -> None:
    assert verdict(Paired(difference, ci95, 0.001, 24), adjusted) == expected


def test_a_family_of_methods() -> None:
    pairs = [(client, seed) for client in range(4) for seed in range(2)]
    reference = dict.fromkeys(pairs, 40.0)
    found = against(
        reference,
        {
            "up": {pair: 42.0 + i for i, pair in enumerate(pairs)},
            "down": {pair: 37.0 - i for i, pair in enumerate(pairs)},
            "same": dict(reference),
            "one": {pair: 40.0 + 50.0 * (i == 0) for i, pair in enumerate(pairs)},
        },
    )
    assert {name: block["verdict"] for name, block in found.items()} == {
        "up": "better",
        "down": "worse",
        "same": "tie",
        "one": "tie",
    }
    assert found["up"]["p"] == pytest.approx(2 / 2**8)
    assert found["up"]["p_adjusted"] == pytest.approx(4 * 2 / 2**8)
    assert found["same"]["p_adjusted"] == 1
    assert found["down"]["difference"] == pytest.approx(-6.5)
    assert {block["pairs"] for block in found.values()} == {8}


def test_many_methods_need_a_smaller_p() -> None:
    """Six positive differences are p = .03125: enough alone, not as one of two."""
    reference = dict.fromkeys(range(6), 10.0)
    better = {i: 12.0 + 0.1 * i for i in range(6)}
    assert against(reference, {"a": better})["a"]["verdict"] == "better"
    assert against(reference, {"a": better, "b": better})["a"]["verdict"] == "tie"
