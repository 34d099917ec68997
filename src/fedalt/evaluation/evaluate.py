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
from fedalt.evaluation.metrics import Judged, Scores, class_scores, mean_scores, score_answer, summarise
from fedalt.evaluation.options import choose
from fedalt.model.adapted import AdaptedModel
from fedalt.model.layer import Placement
from fedalt.model.state import ClientState


@dataclass(frozen=True)
class Evaluation:
    """One client's answers and what they are worth.

    Attributes:
        client: Client id.
        lines: One mapping per row: ``text, answer, reference, category, client_id``; for classes, ``probability``
            of the reference, too; for rows with options, the most likely ``option``.
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
    chosen: list[list[str | None]] = [[None] * len(part) for part in mine]
    if config.options:
        chosen = choose(model, tokenizer, mine, config, weights, normalise=config.options == "mean")
    found = zip(mine, answers, chosen, strict=True)
    return [_score(state.client, *one, config) for state, one in zip(states, found, strict=True)]


def _score(
    client: int,
    rows: Sequence[Example],
    answers: Sequence[str],
    chosen: Sequence[str | None],
    config: EvaluationConfig,
) -> Evaluation:
    lines: list[dict[str, Any]] = []
    scored: list[tuple[str, Scores]] = []
    for example, answer, option in zip(rows, answers, chosen, strict=True):
        line, scores = _line(client, example, answer), score_answer(answer, example.row.output, config.stemmer)
        if option is not None:
            line["option"] = option
            scores["option_accuracy"] = 100.0 * (option.strip() == example.row.output.strip())
        lines.append(line)
        scored.append((example.row.category, scores))
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
