"""Greedy and beam search in which finished rows leave the batch, token for token what `generate` gives.

`generate` keeps every row until the last one has finished, reads every prompt once per beam, and makes its cache anew
for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, EosTokenCriteria, MaxLengthCriteria

from fedalt.evaluation.beams import Beams
from fedalt.evaluation.cache import answer_cache

_LEAVE = 0.2
"""Finished rows leave together, when they are at least this share of the batch; leaving copies the cache."""
_TOKENS = 4_096
"""Tokens of prompts that are read at a time."""

Rows = Callable[[Sequence[int], Tensor | None], AbstractContextManager[None]]
"""Tells the adapted layers which prompts, by index, the rows of the enclosed forward passes belong to, and at which
positions, the same in each row, a state is wanted (nothing: at all)."""


class Unsupported(Exception):  # noqa: N818 - a finding, not an error
    """The model or its generation settings need something this search does not do."""


class Batch:
    """Rows being answered: their cache, their attention mask, and which prompts they answer.

    Args:
        model: The causal LM.
        rows: Tells the adapters whose rows they see.
        ids: Prompts, padded on the left.
        mask: 1 where a token stands.
        cache: Empty cache.
    """

    def __init__(self, model: Any, rows: Rows, ids: Int[Tensor, "n t"], mask: Int[Tensor, "n t"], cache: DynamicCache):
        self.model, self.rows, self.mask, self.cache = model, rows, mask, cache
        self.prompts = list(range(len(ids)))
        self.ids = ids
        self._known = signature(model.forward).parameters

    def read_prompts(self) -> Float[Tensor, "n vocab"]:
        """Read the prompts, some rows at a time without the padding they share; scores of the next token."""
        lengths, scores = self.mask.sum(1).tolist(), []
        layers: Any = self.cache.layers
        start = 0
        while start < len(lengths):
            end, width = start + 1, lengths[start]
            while end < len(lengths) and (end + 1 - start) * max(width, lengths[end]) <= _TOKENS:
                width = max(width, lengths[end])
                end += 1
            for layer in layers:
                layer.rows = slice(start, end)
            ids, mask = self.ids[start:end, -width:], self.mask[start:end, -width:]
            last = torch.tensor([width - 1], device=ids.device)
            scores.append(self._read(ids, mask, self.prompts[start:end], last))
            start = end
        for layer in layers:
            layer.close()
        return torch.cat(scores)

    def _read(
        self, tokens: Int[Tensor, "n t"], mask: Int[Tensor, "n all"], prompts: Sequence[int], wanted: Tensor | None
    ) -> Float[Tensor, "n vocab"]:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        optional = {"position_ids": positions, "logits_to_keep": 1}
        extra = {name: value for name, value in optional.items() if name in self._known}
        with self.rows(prompts, wanted):
            out = self.model(input_ids=tokens, attention_mask=mask, past_key_values=self.cache, use_cache=True, **extra)
        scores: Tensor = out.logits[:, -1]
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def add(self, tokens: Int[Tensor, " n"]) -> Float[Tensor, "n vocab"]:
        """Add one token to every row; scores of the next one."""
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        return self._read(tokens[:, None], self.mask, self.prompts, None)

    def expand(self, beams: int) -> None:
        """Make every row that many rows."""
        self.cache.batch_repeat_interleave(beams)
        self.ids, self.mask = self.ids.repeat_interleave(beams, 0), self.mask.repeat_interleave(beams, 0)

    def keep(self, prompts: Bool[Tensor, " p"]) -> None:
        """Let go of all other prompts' rows."""
        rows = prompts.repeat_interleave(len(self.ids) // len(prompts)).nonzero()[:, 0]
        self.cache.batch_select_indices(rows)
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        self.prompts = [prompt for prompt, stays in zip(self.prompts, prompts.tolist(), strict=True) if stays]

    def reorder(self, rows: Int[Tensor, " n"]) -> None:
        """Go on from other rows of the same prompts."""
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]
        self.ids = self.ids[rows]


class Search:
    """A decoding loop for ``model.generate(custom_generate=...)``, which prepares everything and calls it.

    Args:
        rows: Tells the adapters whose rows they see.
        beams: 1 for greedy search.
        longest: Most new tokens.
    """

    def __init__(self, rows: Rows, beams: int, longest: int) -> None:
        self.rows, self.beams, self.longest = rows, beams, longest

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> list[list[int]]:
        """New tokens of every prompt, the end-of-sequence token included.

        Raises:
            Unsupported: No ordinary cache, or scores that are changed, or a rule for stopping that is not the default.
        """
        rows, prompt = input_ids.shape
        cache = answer_cache(kwargs.get("past_key_values"), rows, prompt, self.longest)
        usual = all(isinstance(rule, MaxLengthCriteria | EosTokenCriteria) for rule in stopping_criteria)
        if cache is None or not usual or len(logits_processor) or generation_config.early_stopping is not False:
            raise Unsupported
        self.ends = generation_config._eos_token_tensor
        self.penalty = generation_config.length_penalty
        mask = kwargs.get("attention_mask")  # nothing when no prompt is padded
        batch = Batch(model, self.rows, input_ids, torch.ones_like(input_ids) if mask is None else mask, cache)
        return self._greedy(batch) if self.beams == 1 else self._beams(batch)

    def _greedy(self, batch: Batch) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in batch.prompts]
        going = torch.ones(len(answers), dtype=torch.bool, device=batch.ids.device)
        scores = batch.read_prompts()
        while True:
            tokens = scores.argmax(-1)
            for prompt, token, goes in zip(batch.prompts, tokens.tolist(), going.tolist(), strict=True):
                if goes:
                    answers[prompt].append(token)
            going = going & ~torch.isin(tokens, self.ends)
            if not going.any() or max(map(len, answers)) == self.longest:
                return answers
            if (~going).float().mean() >= _LEAVE:
                batch.keep(going)
                tokens, going = tokens[going], going[going]
            scores = batch.add(tokens)

    def _beams(self, batch: Batch) -> list[list[int]]:
        best: list[list[int]] = [[] for _ in batch.prompts]
        beams = Beams.start(len(best), self.beams, self.longest, batch.ids.device)
        width, scores = batch.ids.shape[1], batch.read_prompts().repeat_interleave(self.beams, 0)
        batch.expand(self.beams)
        for length in range(1, self.longest + 1):
            last = length == self.longest
            source, tokens = beams.step(
                torch.log_softmax(scores, -1), batch.ids[:, width:], length, self.ends, self.penalty, last
            )
            over = ~beams.open | last
            if over.all() or over.float().mean() >= _LEAVE:
                for at in over.nonzero()[:, 0].tolist():
                    best[batch.prompts[at]] = beams.best(at)
                if over.all():
                    break
                rows = (~over).repeat_interleave(self.beams)
                batch.reorder(source)
                batch.keep(~over)
                beams, tokens = beams.select(~over), tokens[rows]
            else:
                batch.reorder(source)
            scores = batch.add(tokens)
        return best
