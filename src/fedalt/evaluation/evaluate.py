"""Scores of clients on rows: load their adapters, answer or classify, compare with the references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedalt.config import EvaluationConfig
from fedalt.data.encode import Example
from fedalt.evaluation.classify import classify
from fedalt.evaluation.generate import answer_all
from fedalt.evaluation.likeness import load_to_answer
from fedalt.evaluation.metrics import Judged, class_scores, mean_scores, score_answer, summarise
from fedalt.model.adapted import AdaptedModel
from fedalt.model.layer import Placement
from fedalt.model.state import ClientState


@dataclass(frozen=True)
class Evaluation:
    """One client's answers and what they are worth.

    Attributes:
        client: Client id.
        lines: One mapping per row: ``text, answer, reference, category, client_id``; for classes, ``probability``
            of the reference, too.
        scores: Means over rows, and by category.
    """

    client: int
    lines: list[dict[str, Any]]
    scores: dict[str, Any]


def evaluate(
    model: AdaptedModel,
    tokenizer: Any,
    states: Sequence[ClientState],
    rows: Mapping[int, Sequence[Example]],
    placement: Placement,
    config: EvaluationConfig,
) -> list[Evaluation]:
    """Score every client's model on its own rows, all clients in one batch."""
    if not states:
        return []
    mine = [rows[state.client] for state in states]
    weights = load_to_answer(model, states, [[example.input for example in part] for part in mine], placement)
    if model.heads:
        judged = classify(model, mine, config, weights)
        return [_judged(s.client, part, found) for s, part, found in zip(states, mine, judged, strict=True)]
    answers = answer_all(model, tokenizer, [[example.prompt for example in part] for part in mine], config, weights)
    return [_score(s.client, part, found, config) for s, part, found in zip(states, mine, answers, strict=True)]


def _score(client: int, rows: Sequence[Example], answers: Sequence[str], config: EvaluationConfig) -> Evaluation:
    lines = [_line(client, example, answer) for example, answer in zip(rows, answers, strict=True)]
    scored = [
        (example.row.category, score_answer(answer, example.row.output, config.stemmer))
        for example, answer in zip(rows, answers, strict=True)
    ]
    return Evaluation(client, lines, {"client_id": client, "stemmer": config.stemmer, **summarise(scored, mean_scores)})


def _judged(client: int, rows: Sequence[Example], judged: Sequence[Judged]) -> Evaluation:
    lines = [
        {**_line(client, example, one.chosen), "probability": one.probability}
        for example, one in zip(rows, judged, strict=True)
    ]
    scored = [(example.row.category, one) for example, one in zip(rows, judged, strict=True)]
    return Evaluation(client, lines, {"client_id": client, **summarise(scored, class_scores)})


def _line(client: int, example: Example, answer: str) -> dict[str, Any]:
    row = example.row
    known = {"text": row.instruction, "answer": answer, "reference": row.output, "category": row.category}
    return {**known, "client_id": client}
