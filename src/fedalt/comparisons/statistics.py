"""What may be claimed of methods that were run on the same clients: paired tests, margins, sources of variance.

The unit is the client: rows of one client, and seeds, are no independent evidence. Scores of a method less those of the
reference are averaged over seeds first, and over draws of rows unless each draw deals clients anew; the paired t test
is over what is left, one number per client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import fsum, sqrt
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

Verdict = Literal["equivalent", "better", "worse", "not worse", "undecided"]
LEVEL = 0.05
"""Adjusted p values below it count."""
_DIGITS = 9
"""Decimals of a point: what is smaller is rounding."""
_TIMES, _SEED = 10_000, 0
"""Of the bootstrap."""


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean, by Student's t with n - 1 degrees of freedom; of one value nothing."""
    if len(values) < 2:
        return None
    from scipy.special import stdtrit

    return float(stdtrit(len(values) - 1, 0.975)) * _error(values)


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    if max(values) == min(values):
        return 0.0
    middle = fmean(values)
    return sqrt(fsum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))


@dataclass(frozen=True)
class Paired:
    """A method against the reference, over clients.

    Attributes:
        difference: Mean of method less reference, in the score's own unit.
        ci95: Half of the difference's 95 % interval (Student's t over clients).
        p: Two-sided p value of no difference.
        p_equivalent: Of two one-sided tests, the larger p: that the difference is a margin or more, either way.
        p_not_worse: That the method is worse by a margin or more.
        clients: How many differences; of one client there are no intervals and no p values.
    """

    difference: float
    ci95: float | None
    p: float | None
    p_equivalent: float | None
    p_not_worse: float | None
    clients: int


def paired(differences: Sequence[float], margin: float | None = None, higher_is_better: bool = True) -> Paired:
    """Test clients' differences. Without a margin there is no equivalence."""
    rounded = [round(difference, _DIGITS) for difference in differences]
    mean, width = fmean(rounded), half_width(rounded)
    if width is None:
        return Paired(mean, None, None, None, None, len(rounded))
    p = min(1.0, 2 * min(_above(rounded, 0), _below(rounded, 0)))
    if margin is None:
        return Paired(mean, width, p, None, None, len(rounded))
    above, below = _above(rounded, -margin), _below(rounded, margin)
    return Paired(mean, width, p, max(above, below), above if higher_is_better else below, len(rounded))


def _above(values: Sequence[float], bound: float) -> float:
    """One-sided p value that the mean is no larger than a bound."""
    from scipy.special import stdtr

    far, error = fmean(values) - bound, _error(values)
    return float(stdtr(len(values) - 1, -far / error)) if error else float(far <= 0)


def _below(values: Sequence[float], bound: float) -> float:
    return _above([-value for value in values], -bound)


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """Adjust the p values of a family of tests by Holm's step-down rule.

    Of m values the i-th smallest (from 0) is multiplied by m - i, made at least as large as its predecessor, and cut
    at 1. The chance of any false rejection in the family stays below the level.
    """
    adjusted, floor = dict[str, float](), 0.0
    for i, name in enumerate(sorted(values, key=values.__getitem__)):
        floor = max(floor, min(1.0, (len(values) - i) * values[name]))
        adjusted[name] = floor
    return {name: adjusted[name] for name in values}


def verdict(test: Paired, higher_is_better: bool = True) -> Verdict:
    """What follows from p values that have been adjusted.

    ``equivalent`` comes first: the margin says what does not matter, however sure it is that it is not zero.
    """

    def sure(p: float | None) -> bool:
        return p is not None and p < LEVEL

    if sure(test.p_equivalent):
        return "equivalent"
    if sure(test.p):
        return "better" if (test.difference > 0) is higher_is_better else "worse"
    return "not worse" if sure(test.p_not_worse) else "undecided"


_QUESTIONS = ("p", "p_equivalent", "p_not_worse")


def judge(tests: Mapping[str, Paired], higher_is_better: bool = True) -> dict[str, dict[str, Any]]:
    """Adjust the tests of a table, each question as one family, and say what follows.

    Returns:
        Method → the fields of ``Paired``, ``p_adjusted``, ``p_equivalent_adjusted``, …, ``verdict``.
    """
    adjusted = {
        key: holm({name: p for name, test in tests.items() if (p := getattr(test, key)) is not None})
        for key in _QUESTIONS
    }
    found = {}
    for name, test in tests.items():
        known = {key: adjusted[key].get(name) for key in _QUESTIONS}
        after = Paired(**{**asdict(test), **known})
        found[name] = {
            **asdict(test),
            **{f"{key}_adjusted": value for key, value in known.items()},
            "verdict": verdict(after, higher_is_better),
        }
    return found


def against(
    cells: Mapping[str, np.ndarray], *, dealt: bool = False, margin: float | None = None, higher_is_better: bool = True
) -> dict[str, dict[str, Any]]:
    """Test every method against the reference, as one family, and look beyond these rows.

    Args:
        cells: Method → differences to the reference by draw, client and seed.
        dealt: Whether a draw deals rows to clients anew, so that no client is in two draws.
        margin: Differences smaller than this do not matter.
        higher_is_better: Whether more is better.

    Returns:
        Method → as ``judge``, with ``beyond`` (the bootstrap's interval) and ``sources`` of variance.
    """
    tests = {name: paired(by_client(one, dealt), margin, higher_is_better) for name, one in cells.items()}
    return {
        name: {**test, "beyond": beyond(cells[name], dealt), "sources": sources(cells[name], dealt)}
        for name, test in judge(tests, higher_is_better).items()
    }


def by_client(cells: np.ndarray, dealt: bool = False) -> list[float]:
    """One number per client; clients of different deals are different clients."""
    means: np.ndarray = cells.mean(axis=2 if dealt else (0, 2))
    return [float(value) for value in means.flatten()]


def beyond(cells: np.ndarray, dealt: bool = False, times: int = _TIMES) -> list[float] | None:
    """95 % interval of the mean for other clients, draws of rows and seeds, by a hierarchical bootstrap.

    Draws, clients and seeds are drawn with replacement, each as a whole, one fewer than there are, which makes up for
    the mean being theirs (Rao and Wu, 1988); clients within their draw where rows are dealt anew. A source that there
    is one of adds nothing. None where there is one of each.
    """
    import numpy as np

    if cells.size < 2:
        return None
    draws, clients, seeds = cells.shape
    rng = np.random.default_rng(_SEED)

    def weights(count: int, *shape: int) -> np.ndarray:
        size = max(1, count - 1)
        return rng.multinomial(size, [1 / count] * count, (times, *shape)) / size

    chosen = weights(draws), weights(clients, draws) if dealt else weights(clients), weights(seeds)
    means = np.einsum(f"rd,{'rdc' if dealt else 'rc'},rs,dcs->r", *chosen, cells, optimize=True)
    return [float(bound) for bound in np.quantile(means, (0.025, 0.975))]


def sources(cells: np.ndarray, dealt: bool = False) -> dict[str, float]:
    """Standard deviation by source, of components of variance: from the innermost out, by moments.

    Seeds vary within a client and a draw; draws of rows within a client (where dealt anew, clients within a draw). What
    has no second one to compare with is left out.
    """
    names = ["seeds", "clients", "draws"] if dealt else ["seeds", "draws", "clients"]
    found, values, noise = dict[str, float](), cells if dealt else cells.swapaxes(0, 1), 0.0
    for name in names:  # the last axis is the innermost source
        count = values.shape[-1]
        if count > 1:
            seen = float(values.var(axis=-1, ddof=1).mean())
            found[name] = sqrt(max(seen - noise, 0.0))
            noise = seen / count
        values = values.mean(axis=-1)
    return {name: found[name] for name in ("clients", "draws", "seeds") if name in found}
