"""What attacks on a run have found: numbers, intervals, tables and sentences; kept as ``results/audit.json``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedalt.files import intact, read_json, write_json
from fedalt.runs.folder import RunFolder, kept_scores

VIEWS = {"upload": "its upload", "sum": "mean of all", "others": "mean for another", "personal": "personal model"}
ATTACKS = ("threshold", "shadows")
FALSE = 0.01
"""Rate of false alarms at which true ones are counted."""
Array = NDArray[np.float64]
Interval = tuple[float, float]
"""A mean, and half of its 95 % interval by Student's t; NaN for one value."""


@dataclass(frozen=True)
class Leak:
    """How well training rows are told from others.

    Attributes:
        client: Whose rows.
        view: By what, one of ``VIEWS``.
        members: Training rows tried.
        others: Test and validation rows tried.
        auc: Share of pairs of a training row and another in which the training row has the higher score; .5 is chance.
        low: Lower end of the 95 % interval of ``auc`` (DeLong et al., Biometrics 1988).
        high: Upper end.
        found: Share of training rows with a score above all but 1 % of the others.
        epsilon: What the run must have told of a row at least, with a confidence of 95 %; see ``least_epsilon``.
        promised: What it says it has told at most (``privacy.epsilon``), if it says so.
        attack: One of ``ATTACKS``.
    """

    client: int
    view: str
    members: int
    others: int
    auc: float
    low: float
    high: float
    found: float
    epsilon: float = 0.0
    promised: float | None = None
    attack: str = "threshold"


@dataclass(frozen=True)
class Exposure:
    """How much likelier a client's canaries are than secrets that were not planted (Carlini et al., 2019).

    Attributes:
        candidates: Secrets that each one is ranked among by loss, itself included.
        bits: Of every canary: log2 of ``candidates`` less log2 of its rank.
        repeated: Canaries that are written word for word, greedily, after their prompt.
    """

    client: int
    view: str
    candidates: int
    bits: tuple[float, ...]
    repeated: int


@dataclass(frozen=True)
class Audit:
    """All that was tried on a run.

    Attributes:
        round: That clients' models are of.
        secure: Whether no single upload was seen by anybody.
        shadows: Runs on other halves of the rows that the second attack has learnt from.
    """

    round: int
    secure: bool
    shadows: int
    leaks: tuple[Leak, ...]
    exposures: tuple[Exposure, ...] = ()


def write_audit(folder: RunFolder, audit: Audit) -> None:
    """Keep it in the run's folder, for its report."""
    write_json(_file(folder), asdict(audit))
    folder.seal(_file(folder))


def read_audit(folder: RunFolder) -> Audit | None:
    """What is known of a finished run as it is now; None when nobody tried since its last round."""
    file = _file(folder)
    if not folder.final_scores.is_file() or not file.is_file() or folder.changed("results/audit.json"):
        return None
    known = read_json(file)
    with intact(file):
        exposures = tuple(Exposure(**{**one, "bits": tuple(one["bits"])}) for one in known["exposures"])
        leaks = tuple(Leak(**one) for one in known["leaks"])
        audit = Audit(**{**known, "leaks": leaks, "exposures": exposures})
    return audit if audit.round == kept_scores(folder)["round"] else None


def _file(folder: RunFolder) -> Path:
    return folder.final_scores.with_name("audit.json")


# ------------------------------------------------------------------------------------------------------------- numbers


def leak(client: int, view: str, inside: Array, outside: Array, **more: Any) -> Leak:
    """What scores of training rows and of others say."""
    auc, spread = area(inside, outside)
    reach = NormalDist().inv_cdf(0.975) * spread
    limit = np.sort(outside)[::-1][int(FALSE * len(outside))]
    found = float((inside > limit).mean())
    return Leak(
        client, view, len(inside), len(outside), auc, max(0.0, auc - reach), min(1.0, auc + reach), found, **more
    )


def likelihood_ratios(seen: Array, shadows: NDArray[np.float64], inside: NDArray[np.bool_]) -> Array:
    """How much likelier what is seen of every row is if it was trained on (LiRA; Carlini et al., S&P 2022).

        Λ_i = log N(s_i; μ_i⁺, σ₊²) − log N(s_i; μ_i⁻, σ₋²)

    Means are a row's own, over the shadows that were trained on it and over the others; as these are few, variances are
    those of all rows together.

    Args:
        seen: Score of every row under the run that is attacked.
        shadows: The same under every shadow.
        inside: Which rows every shadow was trained on; at least two of either kind for each row.
    """
    found = []
    for mine in (inside, ~inside):
        count = mine.sum(0)
        mean = np.where(mine, shadows, 0).sum(0) / count
        variance = (np.where(mine, shadows - mean, 0) ** 2).sum() / (count - 1).sum() + 1e-12
        found.append(-0.5 * ((seen - mean) ** 2 / variance + np.log(variance)))
    return np.asarray(found[0] - found[1])


def exposure(losses: Array) -> float:
    """log2 of how many candidates there are, less log2 of the first one's rank by loss; ties share their ranks."""
    rank = 1 + (losses[1:] < losses[0]).sum() + 0.5 * (losses[1:] == losses[0]).sum()
    return float(np.log2(len(losses)) - np.log2(rank))


def chance(candidates: int) -> float:
    """The exposure to be expected where nothing was learnt, and every rank is as likely."""
    return float(np.log2(candidates) - np.log2(np.arange(1, candidates + 1)).mean())


def least_epsilon(inside: Array, outside: Array, delta: float = 0.0, confidence: float = 0.95) -> float:
    """The least ε that an attacker's success allows: true positives ≤ e^ε · false ones + δ, and negatives alike.

    The threshold is the one that does best on half of the rows; the other half counts, by the ends of intervals of
    Clopper and Pearson for all four rates. Rows are taken as independent, members and others as of one kind.
    """
    best, limit = 0.0, np.inf
    for candidate in np.unique([*inside[::2], *outside[::2]]):
        apart = float(np.mean(inside[::2] >= candidate) - np.mean(outside[::2] >= candidate))
        best, limit = max((best, limit), (apart, float(candidate)))
    hits, alarms = inside[1::2] >= limit, outside[1::2] >= limit
    risk = (1 - confidence) / 4
    bounds = (
        (_end(hits, risk, high=False) - delta, _end(alarms, risk, high=True)),
        (_end(~alarms, risk, high=False) - delta, _end(~hits, risk, high=True)),
    )
    return max([0.0, *(math.log(true / false) for true, false in bounds if true > 0)])


def _end(found: NDArray[np.bool_], risk: float, *, high: bool) -> float:
    """One end of the interval of a rate (Clopper and Pearson, 1934)."""
    from scipy.stats import beta

    count, total = int(found.sum()), len(found)
    if high:
        return 1.0 if count == total else float(beta.ppf(1 - risk, count + 1, total - count))
    return 0.0 if count == 0 else float(beta.ppf(risk, count, total - count + 1))


def area(inside: Array, outside: Array) -> tuple[float, float]:
    """Area under the ROC curve, ties counted half, and its standard error by DeLong's components."""
    above = (inside[:, None] > outside).astype(float) + 0.5 * (inside[:, None] == outside)
    parts = (above.mean(1), above.mean(0))
    variance = sum(part.var(ddof=1) / len(part) for part in parts if len(part) > 1)
    return float(above.mean()), float(np.sqrt(variance))


def interval(values: Iterable[float]) -> Interval:
    """Mean and half of its interval."""
    from scipy.stats import t

    found = np.array([*values])
    spread = t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found)) if len(found) > 1 else np.nan
    return float(found.mean()), float(spread)


def means(leaks: Sequence[Leak], attack: str = "threshold") -> Mapping[str, Interval]:
    """View → mean of ``auc`` over clients."""
    mine = [one for one in leaks if one.attack == attack]
    return {
        view: interval(x.auc for x in mine if x.view == view) for view in VIEWS if any(x.view == view for x in mine)
    }


# --------------------------------------------------------------------------------------------------- tables and words


def leak_table(audit: Audit) -> tuple[list[str], list[list[str]]]:
    """A head, and a line for each client, view and attack, with means over clients and their largest ε at the end."""
    rows = [
        [
            str(x.client),
            VIEWS[x.view],
            x.attack,
            f"{x.members} + {x.others}",
            f"{x.auc:.2f} ({x.low:.2f}–{x.high:.2f})",
            f"{100 * x.found:.0f} %",
            *_bounds(x),
        ]
        for x in audit.leaks
    ]
    for x in mean_leaks(audit.leaks):
        mean, half = means(audit.leaks, x.attack)[x.view]
        if not math.isnan(half):
            found = [f"{mean:.2f} ± {half:.2f}", f"{100 * x.found:.0f} %", *_bounds(x)]
            rows.append(["mean", VIEWS[x.view], x.attack, "", *found])
    return ["client", "seen", "attack", "rows", "AUC", "found at 1 %", "epsilon ≥", "promised ≤"], rows


def _bounds(leak: Leak) -> tuple[str, str]:
    return f"{leak.epsilon:.2f}", "–" if leak.promised is None else f"{leak.promised:.2f}"


def mean_leaks(leaks: Sequence[Leak]) -> list[Leak]:
    """One for each view and attack: the first client's, with the mean of what is found and the largest bound on ε."""
    found = []
    for attack in ATTACKS:
        for view in VIEWS:
            if mine := [x for x in leaks if (x.view, x.attack) == (view, attack)]:
                share, least = sum(x.found for x in mine) / len(mine), max(x.epsilon for x in mine)
                found.append(replace(mine[0], auc=interval(x.auc for x in mine)[0], found=share, epsilon=least))
    return found


def sentences(audit: Audit) -> list[str]:
    """What came out, a plain sentence for each view and attack, and for planted secrets."""
    told = []
    for x in mean_leaks(audit.leaks):
        mean, half = means(audit.leaks, x.attack)[x.view]
        surely = "" if mean - (0.0 if math.isnan(half) else half) > 0.5 else ", which may be chance"
        told.append(
            f"{_seen(audit, x.view, x.attack)}: a training row has the higher score in {100 * mean:.0f} of 100 pairs "
            f"with another row{surely}; with 1 % false alarms {100 * x.found:.0f} % of training rows are found"
        )
    for view in VIEWS:
        if mine := [x for x in audit.exposures if x.view == view]:
            bits, candidates = [one for x in mine for one in x.bits], mine[0].candidates
            mean, half = interval(bits)
            surely = "" if mean - (0.0 if math.isnan(half) else half) > chance(candidates) else ", which may be chance"
            told.append(
                f"{_seen(audit, view)}: planted secrets have an exposure of {_with_half(mean, half)} bits of "
                f"{np.log2(candidates):.0f} ({chance(candidates):.2f} if nothing was learnt){surely}; "
                f"{sum(x.repeated for x in mine)} of {len(bits)} are written word for word after their prompt"
            )
    return told + [line for line in [_promise(audit.leaks)] if line]


def _promise(leaks: Sequence[Leak]) -> str:
    """The bound on ε that comes nearest to what was promised, or lies furthest beyond."""
    promised = [(x.epsilon / x.promised, x.epsilon, x.promised) for x in leaks if x.promised]
    if not promised:
        return ""
    share, least, most = max(promised)
    verdict = "as it must be" if share <= 1 else "MORE THAN PROMISED"
    return f"epsilon is at least {least:.2f} by these attacks, and at most {most:.2f} by the run's account: {verdict}"


def _seen(audit: Audit, view: str, attack: str = "threshold") -> str:
    nobody = " (kept from everybody by the secure sum)" if audit.secure and view == "upload" else ""
    return f"{VIEWS[view]}{nobody}{f', against {audit.shadows} shadow runs' if attack == 'shadows' else ''}"


def _with_half(mean: float, half: float) -> str:
    return f"{mean:.2f}" if math.isnan(half) else f"{mean:.2f} ± {half:.2f}"
