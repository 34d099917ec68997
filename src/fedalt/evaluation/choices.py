"""Likelihoods: of reference answers, and of the options that an instruction lists, whose likeliest one is chosen.

The score of an option o after a prompt p is

    log P(o | p) = Σ_t log P(o_t | p, o_<t),

over the option's tokens and the end-of-sequence token, as a row with that answer is trained. The end belongs to it:
"no" and "not at all" are then two different answers and not one the beginning of the other, which would always be at
least as likely. A sum prefers short options, as the model does; ``normalise`` divides it by the number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedalt.config import EvaluationConfig
from fedalt.data.batches import collate
from fedalt.data.encode import Example, answer_ids
from fedalt.evaluation.generate import chunks
from fedalt.evaluation.prompt_similarity import Weights
from fedalt.model.adapted import AdaptedModel
from fedalt.model.base import positions
from fedalt.training.loss import token_losses

_HEAD, _ITEM = "OPTIONS:", "- "

Answer = tuple[int, ...]
"""Token ids of an option and the end-of-sequence token."""


def options_of(instruction: str) -> tuple[str, ...]:
    """What may be answered, by the last ``OPTIONS:`` line and the ``- option`` lines right after it; mostly nothing."""
    lines = [line.strip() for line in instruction.split("\n")]
    if _HEAD not in lines:
        return ()
    start = len(lines) - lines[::-1].index(_HEAD)
    listed = takewhile(lambda line: line.startswith(_ITEM), lines[start:])
    return tuple(dict.fromkeys(line.removeprefix(_ITEM).strip() for line in listed))


def choose(scores: Sequence[Sequence[Mapping[str, float]]]) -> list[list[str | None]]:
    """The likeliest option of every client's rows, the first of equally likely ones; nothing where there are none."""
    return [[max(row, key=row.__getitem__) if row else None for row in mine] for mine in scores]


def option_scores(
    model: AdaptedModel,
    tokenizer: Any,
    rows: Sequence[Sequence[Example]],
    config: EvaluationConfig,
    *,
    weights: Weights = None,
    normalise: bool = False,
) -> list[list[dict[str, float]]]:
    """Option → log-likelihood for every client's rows, by the client's own adapters, which are on the model.

    A row without options, or with one that does not fit the model's positions, has no scores. Options with the same
    tokens have the same score.
    """
    limit = positions(model.base)
    answers = [[_answers(tokenizer, example, limit) for example in mine] for mine in rows]
    asked = [
        [(i, answer) for i, options in enumerate(mine) for answer in dict.fromkeys(options.values())]
        for mine in answers
    ]
    found = likelihoods(model, rows, asked, config.batch_size, weights)
    scores = {(k, *one): value for k, mine in enumerate(asked) for one, value in zip(mine, found[k], strict=True)}
    return [
        [
            {option: scores[k, i, ids] / (len(ids) if normalise else 1) for option, ids in options.items()}
            for i, options in enumerate(mine)
        ]
        for k, mine in enumerate(answers)
    ]


def reference_losses(
    model: AdaptedModel, rows: Sequence[Sequence[Example]], config: EvaluationConfig, weights: Weights = None
) -> list[list[float]]:
    """Nats of every row's reference answer under its client's own adapters, which are on the model."""
    asked = [[(i, example.answer) for i, example in enumerate(mine)] for mine in rows]
    return [[-value for value in mine] for mine in likelihoods(model, rows, asked, config.batch_size, weights)]


def likelihoods(
    model: AdaptedModel,
    rows: Sequence[Sequence[Example]],
    asked: Sequence[Sequence[tuple[int, Answer]]],
    size: int,
    weights: Weights = None,
) -> list[list[float]]:
    """Log-likelihood of answers to every client's rows, each with its row's place; ``size`` per client at a time."""
    whole = [[rows[k][i].prompt + answer for i, answer in mine] for k, mine in enumerate(asked)]
    scores = [[0.0] * len(mine) for mine in asked]
    for chunk in chunks(whole, size):
        groups: list[list[Example]] = [[] for _ in rows]
        for k, j in chunk:
            i, answer = asked[k][j]
            groups[k].append(replace(rows[k][i], answer=answer))
        mine = None if weights is None else torch.stack([weights[k][asked[k][j][0]] for k, j in chunk])
        for (k, j), value in zip(chunk, log_likelihoods(model, groups, mine).tolist(), strict=True):
            scores[k][j] = value
    return scores


@torch.no_grad()
def log_likelihoods(
    model: AdaptedModel, groups: Sequence[Sequence[Example]], weights: Float[Tensor, "n m"] | None = None
) -> Float[Tensor, " n"]:
    """Sum of the log-probabilities of every row's answer tokens, client by client, in one forward pass."""
    batch = collate(groups).to(model.device)
    if weights is not None:
        batch = replace(batch, rows=replace(batch.rows, weights=weights.to(model.device)))
    tokens = token_losses(model, batch)
    lengths = torch.tensor([len(example.answer) for group in groups for example in group], device=model.device)
    row = torch.arange(len(lengths), device=model.device).repeat_interleave(lengths)  # [s]
    return -tokens.new_zeros(len(lengths)).index_add(0, row, tokens)


def _answers(tokenizer: Any, example: Example, limit: int | None) -> dict[str, Answer]:
    options = options_of(example.row.instruction)
    ids = [answer_ids(tokenizer, option, example.prompt, example.asked) for option in options]
    found = {option: (*tokens, tokenizer.eos_token_id) for option, tokens in zip(options, ids, strict=True)}
    longest = max(map(len, found.values()), default=0)
    return found if limit is None or len(example.prompt) + longest <= limit else {}
