"""Classes of many clients' rows in one batch on one base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fedalt.config import EvaluationConfig
from fedalt.data.encode import Example, Input, laid_out
from fedalt.evaluation.generate import chunks
from fedalt.evaluation.prompt_similarity import Weights
from fedalt.model.adapted import AdaptedModel
from fedalt.model.batch_layout import BatchLayout


class Judged(NamedTuple):
    """The class that a model chose, and the probability that it gave the right one."""

    chosen: str
    probability: float


def classify(
    model: AdaptedModel, rows: Sequence[Sequence[Example]], config: EvaluationConfig, weights: Weights = None
) -> list[list[Judged]]:
    """Choose the most probable class of every client's rows with the client's own adapters and head.

    Args:
        model: The model, with one set of adapters and heads per entry of ``rows``.
        rows: Examples per client.
        config: Rows per client and batch.
        weights: Weights of the slots for every row, if its adapters are mixed by instance.
    """
    names = [model.base.config.id2label[i] for i in range(model.base.config.num_labels)]
    found = probabilities(model, [[example.input for example in mine] for mine in rows], config.batch_size, weights)
    return [
        [Judged(names[int(p.argmax())], float(p[example.label])) for example, p in zip(mine, chances, strict=True)]
        for mine, chances in zip(rows, found, strict=True)
    ]


@torch.no_grad()
def probabilities(
    model: AdaptedModel, inputs: Sequence[Sequence[Input]], size: int, weights: Weights = None
) -> list[Float[Tensor, "n classes"]]:
    """Probability of every class for every client's texts or images.

    Args:
        model: The model, with one set of adapters and heads per entry of ``inputs``.
        inputs: Texts or images per client.
        size: How many of a client at a time.
        weights: Weights of the slots for every input.
    """
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
