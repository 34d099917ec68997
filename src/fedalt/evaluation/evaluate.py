"""Scores of clients on rows: load their adapters, answer or classify, compare with the references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedalt.config import EvaluationConfig
from fedalt.data.encode import Example
from fedalt.evaluation.choices import choose, reference_losses
from fedalt.evaluation.classify import classify
from fedalt.evaluation.generate import answer_all
from fedalt.evaluation.metrics import measures, rouge_tokenizer, score
from fedalt.evaluation.prompt_similarity import Weights, load_to_answer
from fedalt.model.adapted import AdaptedModel
from fedalt.model.layer import Placement
from fedalt.model.state import ClientState


@dataclass(frozen=True)
class Evaluation:
    """One client's answers and what they are worth.

    Attributes:
        client: Client id.
        lines: One mapping per row: ``text, answer, reference, category, client_id``; for classes, ``probability``
            of the reference, too; for rows with options, the most likely ``option``; where it is measured, the ``loss``
            of the reference in nats, over so many ``tokens``.
        scores: Every metric over all rows, and by category.
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
    *,
    config: EvaluationConfig,
) -> list[Evaluation]:
    """Score every client's model on its own rows, all clients in one batch."""
    if not states:
        return []
    mine = [rows[state.client] for state in states]
    asked = measures(config, classes=bool(model.heads))
    weights = load_to_answer(model, states, [[example.input for example in part] for part in mine], placement)
    if model.heads:
        lines = [
            [
                {**_line(s.client, example, one.chosen), "probability": one.probability}
                for example, one in zip(*both, strict=True)
            ]
            for s, *both in zip(states, mine, classify(model, mine, config, weights), strict=True)
        ]
        about: list[dict[str, Any]] = [{} for _ in states]
    else:
        lines = _answered(model, tokenizer, states, mine, weights, config=config)
        used = [rouge_tokenizer(example.row.output for example in part) for part in mine]
        about = [{"stemmer": config.stemmer, "rouge_tokenizer": one} for one in used]
    return [
        Evaluation(state.client, part, {"client_id": state.client, **how, **score(part, asked)})
        for state, part, how in zip(states, lines, about, strict=True)
    ]


def _answered(
    model: AdaptedModel,
    tokenizer: Any,
    states: Sequence[ClientState],
    rows: Sequence[Sequence[Example]],
    weights: Weights,
    *,
    config: EvaluationConfig,
) -> list[list[dict[str, Any]]]:
    """A line per row with what each client's model writes, and with the option that it finds likeliest."""
    answers = answer_all(model, tokenizer, [[example.prompt for example in part] for part in rows], config, weights)
    lines = [
        [_line(state.client, example, answer) for example, answer in zip(part, written, strict=True)]
        for state, part, written in zip(states, rows, answers, strict=True)
    ]
    if config.options:
        chosen = choose(model, tokenizer, rows, config, weights=weights, normalise=config.options == "mean")
        for part, options in zip(lines, chosen, strict=True):
            for line, option in zip(part, options, strict=True):
                line.update({} if option is None else {"option": option})
    if config.measures_loss:
        for part, mine, losses in zip(lines, rows, reference_losses(model, rows, config, weights), strict=True):
            for line, example, nats in zip(part, mine, losses, strict=True):
                line.update(loss=nats, tokens=len(example.answer))
    return lines


def _line(client: int, example: Example, answer: str) -> dict[str, Any]:
    row = example.row
    known = {"text": row.instruction, "answer": answer, "reference": row.output, "category": row.category}
    return {**known, "client_id": client}
