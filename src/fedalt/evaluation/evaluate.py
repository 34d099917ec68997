"""Scores of clients on rows: load their adapters, answer or classify, compare with the references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedalt.config import EvaluationConfig
from fedalt.data.encode import Example, Input, laid_out
from fedalt.evaluation.choices import choose, option_scores, reference_losses
from fedalt.evaluation.generate import answer_all, chunks
from fedalt.evaluation.metrics import measures, rouge_tokenizer, score
from fedalt.evaluation.prompt_similarity import Weights, load_to_answer
from fedalt.model.adapted import AdaptedModel
from fedalt.model.batch_layout import BatchLayout
from fedalt.model.layer import Placement
from fedalt.model.state import ClientState


@dataclass(frozen=True)
class Evaluation:
    """One client's answers and what they are worth.

    Attributes:
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
        lines = _classified(model, states, mine, weights, config.batch_size)
        about: list[dict[str, Any]] = [{} for _ in states]
    else:
        lines = _answered(model, tokenizer, states, mine, weights, config=config)
        used = [rouge_tokenizer(example.row.output for example in part) for part in mine]
        about = [{"stemmer": config.stemmer, "rouge_tokenizer": one} for one in used]
    return [
        Evaluation(state.client, part, {"client_id": state.client, **how, **score(part, asked)})
        for state, part, how in zip(states, lines, about, strict=True)
    ]


def _classified(
    model: AdaptedModel,
    states: Sequence[ClientState],
    rows: Sequence[Sequence[Example]],
    weights: Weights,
    size: int,
) -> list[list[dict[str, Any]]]:
    """A line per row with its most probable class, by each client's own adapters and head."""
    names = [model.base.config.id2label[i] for i in range(model.base.config.num_labels)]
    found = probabilities(model, [[example.input for example in part] for part in rows], size, weights)
    return [
        [
            {**_line(state.client, example, names[int(p.argmax())]), "probability": float(p[example.label])}
            for example, p in zip(part, chances, strict=True)
        ]
        for state, part, chances in zip(states, rows, found, strict=True)
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
        normalise = config.options == "mean"
        scores = option_scores(model, tokenizer, rows, config, weights=weights, normalise=normalise)
        for part, options in zip(lines, choose(scores), strict=True):
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


@torch.no_grad()
def probabilities(
    model: AdaptedModel, inputs: Sequence[Sequence[Input]], size: int, weights: Weights = None
) -> list[Float[Tensor, "n classes"]]:
    """Probability of every class for every client's texts or images."""
    found = [torch.zeros(len(mine), model.base.config.num_labels) for mine in inputs]
    for chunk in chunks(inputs, size):
        values = [inputs[k][i] for k, i in chunk]
        sizes = tuple(sum(owner == k for owner, _ in chunk) for k in range(len(inputs)))
        mine = None if weights is None else torch.stack([weights[k][i] for k, i in chunk]).to(model.device)
        rows = BatchLayout(sizes, tuple(map(len, values)), weights=mine)
        scores = model.class_scores(laid_out(values).to(model.device), rows).float().softmax(-1).cpu()
        for (k, i), p in zip(chunk, scores, strict=True):
            found[k][i] = p
    return found
