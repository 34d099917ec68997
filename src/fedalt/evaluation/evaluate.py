"""Scores of clients on rows: load their adapters, answer, compare with the references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedalt.config import EvaluationConfig
from fedalt.data.encode import Example
from fedalt.evaluation.generate import answer_all
from fedalt.evaluation.likeness import load_to_answer
from fedalt.evaluation.metrics import Scores, score_answer, summarise
from fedalt.model.adapted import AdaptedModel
from fedalt.model.layer import Placement
from fedalt.model.state import ClientState


@dataclass(frozen=True)
class Evaluation:
    """One client's answers and what they are worth.

    Attributes:
        client: Client id.
        lines: One mapping per row: ``text, answer, reference, category, client_id``.
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
    """Score every client's model on its own rows, all clients in one generation batch."""
    if not states:
        return []
    prompts = [[example.prompt for example in rows[state.client]] for state in states]
    weights = load_to_answer(model, states, prompts, placement)
    answers = answer_all(model, tokenizer, prompts, config, weights)
    return [_score(s.client, rows[s.client], mine, config) for s, mine in zip(states, answers, strict=True)]


def _score(client: int, rows: Sequence[Example], answers: Sequence[str], config: EvaluationConfig) -> Evaluation:
    lines: list[dict[str, Any]] = []
    scored: list[tuple[str, Scores]] = []
    for example, answer in zip(rows, answers, strict=True):
        row = example.row
        lines.append(
            {
                "text": row.instruction,
                "answer": answer,
                "reference": row.output,
                "category": row.category,
                "client_id": client,
            }
        )
        scored.append((row.category, score_answer(answer, row.output, config.stemmer)))
    return Evaluation(client, lines, {"client_id": client, "stemmer": config.stemmer, **summarise(scored)})
