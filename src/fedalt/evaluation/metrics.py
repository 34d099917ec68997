"""Scores of answers (ROUGE, exact match) and of classes (accuracy, macro-F1, log-loss); means are taken where shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import log
from typing import Any, TypeVar

LABELS = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "exact_match": "exact match",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "log_loss": "log-loss",
    "option_accuracy": "option accuracy",
}
"""Name → heading of everything that can be measured, in the order of tables. 0 to 100; log-loss is in nats."""
_ROUGE = ("rouge1", "rouge2", "rougeL")
_LEAST = 1e-12

Scores = Mapping[str, float]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Judged:
    """A class that a model chose.

    Attributes:
        chosen: The class.
        reference: The right one.
        probability: What the model gave the right one.
    """

    chosen: str
    reference: str
    probability: float


def score_answer(answer: str, reference: str, stemmer: bool) -> dict[str, float]:
    """ROUGE-1/2/L F-measures and exact match of one answer, each 0 to 100.

    ROUGE is Google's ``rouge_score`` with its default tokenizer, which keeps a–z and 0–9 only: text in other scripts
    scores 0. Exact match compares the stripped strings.
    """
    rouge = _scorer(stemmer).score(reference, answer)
    scores = {name: 100 * float(rouge[name].fmeasure) for name in _ROUGE}
    return scores | {"exact_match": 100.0 * (answer.strip() == reference.strip())}


def mean_scores(rows: Sequence[Scores]) -> dict[str, float]:
    """Mean of every metric over rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    found = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def class_scores(rows: Sequence[Judged]) -> dict[str, float]:
    """Accuracy and macro-F1, 0 to 100, and log-loss in nats.

    F1_c = 2 TP_c / (2 TP_c + FP_c + FN_c),   averaged over the classes that occur among references or choices
    log-loss = −mean log p(reference),   p no lower than 1e-12
    """
    if not rows:
        return {}
    hits = sum(row.chosen == row.reference for row in rows)
    present = sorted({row.reference for row in rows} | {row.chosen for row in rows})
    f1 = [_f1(rows, label) for label in present]
    loss = -sum(log(max(row.probability, _LEAST)) for row in rows) / len(rows)
    return {"accuracy": 100 * hits / len(rows), "macro_f1": 100 * sum(f1) / len(f1), "log_loss": loss}


def _f1(rows: Sequence[Judged], label: str) -> float:
    right = sum(row.chosen == row.reference == label for row in rows)
    named = sum((row.chosen == label) + (row.reference == label) for row in rows)
    return 2 * right / named


def summarise(rows: Sequence[tuple[str, T]], means: Callable[[Sequence[T]], dict[str, float]]) -> dict[str, Any]:
    """Scores of all rows and by category, with counts."""
    categories = sorted({category for category, _ in rows})
    by_category = {name: _block([s for category, s in rows if category == name], means) for name in categories}
    return {**_block([s for _, s in rows], means), "categories": by_category}


def metrics_in(scores: Mapping[str, Any]) -> dict[str, float]:
    """The metrics among other things, in the order of tables."""
    return {name: scores[name] for name in LABELS if name in scores}


def as_text(name: str, value: float | None) -> str:
    """A score as tables show it; a dash for none."""
    if value is None:
        return "–"
    return f"{value:.3f}" if name == "log_loss" else f"{value:.1f}"


def group_mean(values: Iterable[float]) -> float | None:
    """Mean of some clients' scores; nothing for no client."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


def over_clients(scores: Sequence[float]) -> dict[str, float]:
    """Mean, worst and 10th percentile of the clients' scores."""
    return {"mean": sum(scores) / len(scores), "worst": min(scores), "p10": percentile(scores, 10)}


def percentile(values: Sequence[float], percent: float) -> float:
    """Percentile with linear interpolation between neighbours, as NumPy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _block(rows: Sequence[T], means: Callable[[Sequence[T]], dict[str, float]]) -> dict[str, Any]:
    return {"rows": len(rows), **means(rows)}


@cache
def _scorer(stemmer: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(_ROUGE), use_stemmer=stemmer)
