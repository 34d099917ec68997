"""ROUGE and exact match, per row; means are taken where they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

METRICS = ("rouge1", "rouge2", "rougeL", "exact_match")
_ROUGE = METRICS[:3]

Scores = Mapping[str, float]


def score_answer(answer: str, reference: str, stemmer: bool) -> dict[str, float]:
    """ROUGE-1/2/L F-measures and exact match of one answer, each 0 to 100.

    ROUGE is Google's ``rouge_score`` with its default tokenizer, which keeps a–z and 0–9 only: text in other scripts
    scores 0. Exact match compares the stripped strings.
    """
    rouge = _scorer(stemmer).score(reference, answer)
    scores = {name: 100 * float(rouge[name].fmeasure) for name in _ROUGE}
    return scores | {"exact_match": 100.0 * (answer.strip() == reference.strip())}


def mean_scores(rows: Sequence[Scores]) -> dict[str, float]:
    """Mean of every metric over rows; empty when there are none."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in METRICS} if rows else {}


def summarise(rows: Sequence[tuple[str, Scores]]) -> dict[str, Any]:
    """Means over all rows and by category, with counts."""
    categories = sorted({category for category, _ in rows})
    by_category = {name: _block([s for category, s in rows if category == name]) for name in categories}
    return {**_block([s for _, s in rows]), "categories": by_category}


def group_mean(values: Iterable[float]) -> float | None:
    """Mean of some clients' scores; nothing for no client."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


def _block(rows: Sequence[Scores]) -> dict[str, Any]:
    return {"rows": len(rows), **mean_scores(rows)}


@cache
def _scorer(stemmer: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(_ROUGE), use_stemmer=stemmer)
