"""Greedy and beam search in which finished rows leave the batch, token for token what `generate` gives.

`generate` keeps every row until the last one has finished, reads every prompt once per beam, and makes its cache anew
for every token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria

from fedalt.evaluation.batch import Batch, Branched, Owners
from fedalt.evaluation.beams import Beams
from fedalt.evaluation.cache import answer_cache

_LEAVE = 0.2
"""Finished rows leave together, when they are at least this share of the batch; leaving copies the cache."""


class Unsupported(Exception):  # noqa: N818 - a finding, not an error
    """The model or its generation settings need something this search does not do."""


class Search:
    """A decoding loop for ``model.generate(custom_generate=...)``, which prepares everything and calls it.

    Args:
        owners: Tells the adapters whose rows they see.
        beams: 1 for greedy search.
        longest: Most new tokens.
        branched: Whether beams, more than one, share a row; that must be exact for this model.
    """

    def __init__(self, owners: Owners, beams: int, longest: int, branched: bool) -> None:
        self.owners, self.beams, self.longest, self.branched = owners, beams, longest, branched

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
        room = self.longest * self.beams if self.branched else self.longest
        cache = answer_cache(kwargs.get("past_key_values"), rows, prompt, room)
        usual = all(isinstance(rule, MaxLengthCriteria | EosTokenCriteria) for rule in stopping_criteria)
        if cache is None or not usual or len(logits_processor) or generation_config.early_stopping is not False:
            raise Unsupported
        self.ends = generation_config._eos_token_tensor
        self.penalty = generation_config.length_penalty
        mask = kwargs.get("attention_mask")  # nothing when no prompt is padded
        mask = torch.ones_like(input_ids) if mask is None else mask
        batch = (Branched if self.branched else Batch)(model, self.owners, input_ids, mask, cache)
        return self._greedy(batch) if self.beams == 1 else self._beams(batch)

    def _greedy(self, batch: Batch) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in batch.prompts]
        going = torch.ones(len(answers), dtype=torch.bool, device=batch.mask.device)
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
        beams = Beams.start(len(best), self.beams, self.longest, batch.mask.device)
        scores = batch.read_prompts().repeat_interleave(self.beams, 0)
        batch.grow(self.beams)
        for length in range(1, self.longest + 1):
            last = length == self.longest
            source, tokens = beams.step(
                torch.log_softmax(scores, -1), batch.answers, length, self.ends, self.penalty, last
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
