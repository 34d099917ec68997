"""Answers of many clients' models in one generation batch on one base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor
from transformers import TextStreamer

from fedalt.config import EvaluationConfig
from fedalt.data.batches import pad_prompts
from fedalt.data.encode import Input, Prompt
from fedalt.evaluation.decode import Search, Unsupported
from fedalt.evaluation.prompt_similarity import Weights
from fedalt.model.adapted import AdaptedModel
from fedalt.model.base import cache_bytes
from fedalt.model.batch_layout import BatchLayout
from fedalt.model.offload import free_memory

_IGNORES_PADDING = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
"""Before that, a penalty of repetitions in a model's own settings counts padding as words of the prompt."""
_SHARE = 0.5
"""Most of the free memory that the keys and values of a batch may take."""


def answer_all(
    model: AdaptedModel,
    tokenizer: Any,
    prompts: Sequence[Sequence[Prompt]],
    config: EvaluationConfig,
    weights: Weights = None,
) -> list[list[str]]:
    """Answer every client's prompts with the client's own adapters, which are on the model.

    Prompts are left-padded under an attention mask; an answer ends at the end-of-sequence token. A batch is as large
    as ``batch_size`` allows, or smaller where its keys and values would not fit well into free memory.
    """
    answers: list[list[str]] = [[""] * len(mine) for mine in prompts]
    most = fitting_prompts(model, max((len(prompt) for mine in prompts for prompt in mine), default=0), config)
    whole = chunks(prompts, config.batch_size)
    for chunk in (part[at : at + most] for part in whole for at in range(0, len(part), most)):
        mine = None if weights is None else torch.stack([weights[k][i] for k, i in chunk])
        texts = answer(model, tokenizer, [prompts[k][i] for k, i in chunk], [k for k, _ in chunk], config, weights=mine)
        for (k, i), text in zip(chunk, texts, strict=True):
            answers[k][i] = text
    return answers


def chunks(prompts: Sequence[Sequence[Input]], size: int) -> Iterator[list[tuple[int, int]]]:
    """(Client, prompt) of every row of a batch: up to ``size`` of every client, each client's longest first.

    The first batch is the largest, so memory that suffices for it suffices for all.
    """
    order = [sorted(range(len(mine)), key=lambda i, mine=mine: -len(mine[i])) for mine in prompts]  # type: ignore[misc]
    for start in range(0, max(map(len, prompts), default=0), size):
        yield [(k, i) for k, mine in enumerate(order) for i in mine[start : start + size]]


def fitting_prompts(model: AdaptedModel, longest: int, config: EvaluationConfig) -> int:
    """Prompts whose keys and values, with those of all beams' answers, fit well into free memory; at least one."""
    beams, new = config.num_beams, config.max_new_tokens
    shared = beams == 1 or model.branches(longest + beams * new)  # else every beam has a copy of its prompt
    tokens = longest + beams * new if shared else beams * (longest + new)
    each = max(1, tokens * cache_bytes(model.base))
    return max(1, int(_SHARE * free_memory(model.device)) // each)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, where answers are not to be the likeliest."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


@torch.no_grad()
def answer(
    model: AdaptedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    owners: Sequence[int],
    config: EvaluationConfig,
    *,
    weights: Float[Tensor, "n m"] | None = None,
    sampling: Sampling | None = None,
    streamer: TextStreamer | None = None,
) -> list[str]:
    """Answer one batch of prompts, client by client; special tokens and surrounding white space are stripped.

    ``owners`` has the stack index of every prompt's client. Tokens are drawn where ``sampling`` is given, without
    beams; ``streamer`` gets those of a single prompt's answer as they come, where there are no beams.
    """
    lengths = [len(prompt) for prompt in prompts]
    if len(set(lengths)) > 1 and not model.pads_left:
        apart = [""] * len(prompts)
        for some in _alike(lengths):
            mine = None if weights is None else weights[some]
            asked, mine_of = [prompts[row] for row in some], [owners[row] for row in some]
            for row, text in zip(some, answer(model, tokenizer, asked, mine_of, config, weights=mine), strict=True):
                apart[row] = text
        return apart
    weights = None if weights is None else weights.to(model.device)
    ids, mask = pad_prompts(prompts, tokenizer.pad_token_id)

    def rows(present: Sequence[int], wanted: Tensor | None = None) -> AbstractContextManager[None]:
        counts = Counter(owners[prompt] for prompt in present)
        mine = None if weights is None else weights[list(present)]
        return model.rows(BatchLayout(tuple(counts[k] for k in range(model.clients)), wanted=wanted, weights=mine))

    options: dict[str, Any] = {
        "input_ids": ids.to(model.device),
        "attention_mask": mask.to(model.device),
        "max_new_tokens": config.max_new_tokens,
        "do_sample": False,
        "num_return_sequences": 1,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    beams, new = 1 if sampling else config.num_beams, config.max_new_tokens
    streamer = streamer if beams == 1 else None
    try:
        if sampling:
            raise Unsupported
        search = Search(rows, beams, new, beams > 1 and model.branches(max(lengths) + beams * new), streamer)
        answers = model.base.generate(**options, num_beams=1, custom_generate=search)
        return _texts(tokenizer, answers)
    except Unsupported:
        texts = [""] * len(prompts)
        options["use_cache"] = model.caches
        if streamer is not None:
            options["streamer"], streamer.next_tokens_are_prompt = streamer, True
        if sampling:
            options |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        for some in [list(range(len(prompts)))] if _IGNORES_PADDING else _alike(lengths):
            longest = max(len(prompts[row]) for row in some)
            part = {name: options[name][some, -longest:] for name in ("input_ids", "attention_mask")}
            with rows(some), _seeded(sampling):
                answers = model.base.generate(**options | part, num_beams=beams)[:, longest:]
            for row, text in zip(some, _texts(tokenizer, answers), strict=True):
                texts[row] = text
        return texts


@contextmanager
def _seeded(sampling: Sampling | None) -> Iterator[None]:
    """Draws of the enclosed block come from the seed, and nobody else's change."""
    with torch.random.fork_rng(enabled=sampling is not None):
        if sampling is not None:
            torch.manual_seed(sampling.seed)
        yield


def _texts(tokenizer: Any, answers: Tensor) -> list[str]:
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def _alike(lengths: Sequence[int]) -> list[list[int]]:
    """Rows of one length, for each length: for what takes padding for text."""
    return [[row for row, other in enumerate(lengths) if other == one] for one in dict.fromkeys(lengths)]
