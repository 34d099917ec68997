"""Intervals and paired tests over seeds and clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Any, Literal

Verdict = Literal["better", "worse", "tie"]
LEVEL = 0.05
"""Adjusted p values below it count."""
_DIGITS = 9
"""Decimals of a point: what is smaller is rounding, and must not break a tie."""


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean, by Student's t with n - 1 degrees of freedom; of one value nothing."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / sqrt(len(values))


@dataclass(frozen=True)
class Paired:
    """A method against the reference.

    Attributes:
        difference: Mean of method less reference, in the score's own unit.
        ci95: Half of the difference's 95 % interval (Student's t over pairs); None with fewer than two pairs.
        p: Two-sided p value; None with fewer than two pairs.
        pairs: How many differences.
    """

    difference: float
    ci95: float | None
    p: float | None
    pairs: int


def paired(differences: Sequence[float]) -> Paired:
    """Test whether the differences of (client, seed) pairs are centred on zero, with Wilcoxon's signed ranks.

    Ranks and not a t test, because differences between clients are no sample of one bell curve: a method may lose fifty
    points on one task and none on the others, and such a client alone would decide a t test's variance. The interval
    beside it does rest on t; a verdict needs both, so a result that hangs on one client's size alone is a tie.
    Differences of zero say nothing about direction and are left out; the interval counts them. If all are zero, p is 1.
    With five others or fewer no difference can reach p < .05 (the smallest p is 2 / 2^5). The distribution is exact for
    different ranks up to 50 pairs and for ties up to 13, and a bell curve above.

    The pairs of one client share its rows, and those of one seed its start values, so they are not independent: p says
    how consistent a difference is over these clients and seeds, and is too small for a claim about others.
    """
    rounded = [round(difference, _DIGITS) for difference in differences]
    mean, width, changed = fmean(rounded), half_width(rounded), [one for one in rounded if one]
    return Paired(mean, width, None if width is None else _signed_ranks(changed), len(rounded))


def _signed_ranks(changed: Sequence[float]) -> float:
    if not changed:
        return 1.0
    from scipy.stats import wilcoxon

    return float(wilcoxon(changed).pvalue)


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """Adjust the p values of a family of tests by Holm's step-down rule.

    Of m values the i-th smallest (from 0) is multiplied by m - i, made at least as large as its predecessor, and cut
    at 1. The chance of any false difference in the family stays below the level.
    """
    adjusted, floor = dict[str, float](), 0.0
    for i, name in enumerate(sorted(values, key=values.__getitem__)):
        floor = max(floor, min(1.0, (len(values) - i) * values[name]))
        adjusted[name] = floor
    return {name: adjusted[name] for name in values}


def verdict(test: Paired, adjusted: float | None, higher_is_better: bool = True) -> Verdict:
    """``better`` or ``worse`` if the adjusted p is below .05 and the interval excludes zero, otherwise ``tie``."""
    if adjusted is None or test.ci95 is None or adjusted >= LEVEL or abs(test.difference) <= test.ci95:
        return "tie"
    return "better" if (test.difference > 0) is higher_is_better else "worse"


def against(
    reference: Mapping[Any, float], others: Mapping[str, Mapping[Any, float]], higher_is_better: bool = True
) -> dict[str, dict[str, Any]]:
    """Test every method against the reference, as one family.

    Returns:
        Method → ``difference``, ``ci95``, ``p``, ``p_adjusted``, ``pairs``, ``verdict``.
    """
    tests = {name: paired([scores[pair] - reference[pair] for pair in reference]) for name, scores in others.items()}
    adjusted = holm({name: test.p for name, test in tests.items() if test.p is not None})
    return {
        name: {**asdict(test), "p_adjusted": p, "verdict": verdict(test, p, higher_is_better)}
        for name, test in tests.items()
        for p in [adjusted.get(name)]
    }
