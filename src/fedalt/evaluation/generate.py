"""Answers of many clients' models in one generation batch on one base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedalt.config import EvaluationConfig
from fedalt.data.batches import Prompt, pad_prompts
from fedalt.model.adapted import AdaptedModel
from fedalt.model.rowmap import RowMap


@dataclass(frozen=True)
class Chunk:
    """Prompts that are answered together.

    Attributes:
        places: (client's stack index, index of the prompt) of every row, client by client.
        rows: Rows per client.
    """

    places: tuple[tuple[int, int], ...]
    rows: RowMap


def answer_all(
    model: AdaptedModel, tokenizer: Any, prompts: Sequence[Sequence[Prompt]], config: EvaluationConfig
) -> list[list[str]]:
    """Answer every client's prompts with the client's own adapters, which are on the model.

    Prompts are left-padded under an attention mask; an answer ends at the end-of-sequence token.

    Args:
        model: The model, with one set of adapters per entry of ``prompts``.
        tokenizer: Its tokenizer.
        prompts: Token ids per client.
        config: Beams, longest answer, prompts per client and batch.
    """
    answers: list[list[str]] = [[""] * len(mine) for mine in prompts]
    for chunk in chunks(prompts, config.batch_size):
        ids = [prompts[k][i] for k, i in chunk.places]
        with model.rows(chunk.rows):
            texts = generate(model, tokenizer, ids, config)
        for (k, i), text in zip(chunk.places, texts, strict=True):
            answers[k][i] = text
    return answers


def chunks(prompts: Sequence[Sequence[Prompt]], size: int) -> Iterator[Chunk]:
    """Up to ``size`` prompts of every client at a time, each client's shortest first, so little padding is needed."""
    order = [sorted(range(len(mine)), key=lambda i, mine=mine: len(mine[i])) for mine in prompts]  # type: ignore[misc]
    for start in range(0, max(map(len, prompts), default=0), size):
        taken = [mine[start : start + size] for mine in order]
        places = tuple((k, i) for k, mine in enumerate(taken) for i in mine)
        yield Chunk(places, RowMap(tuple(map(len, taken))))


@torch.no_grad()
def generate(model: AdaptedModel, tokenizer: Any, prompts: Sequence[Prompt], config: EvaluationConfig) -> list[str]:
    """One call of ``generate`` without sampling; special tokens and surrounding white space are stripped."""
    ids, mask = pad_prompts(prompts, tokenizer.pad_token_id)
    out = model.base.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=config.max_new_tokens,
        num_beams=config.num_beams,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts: list[str] = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]
