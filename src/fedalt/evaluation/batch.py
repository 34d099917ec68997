"""Prompts being answered in one batch: their cache, who is in it, and what is read next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from fedalt.model.branching import additive

_TOKENS = 2_048
"""Tokens of prompts that are read at a time."""

Owners = Callable[[Sequence[int], Tensor | None], AbstractContextManager[None]]
"""Tells the adapted layers which prompts, by index, the rows of the enclosed forward passes belong to, and at which
positions, the same in each row, a state is wanted (nothing: at all)."""


class Batch:
    """Prompts and their answers so far; beams, if any, have a row each.

    Args:
        model: The causal LM.
        owners: Tells the adapters whose rows they see.
        ids: Prompts, padded on the left.
        mask: 1 where a token stands.
        cache: Empty cache.

    Attributes:
        prompts: Which prompts are still in it.
        answers: Their tokens so far, all beams of a prompt one after another.
    """

    def __init__(
        self, model: Any, owners: Owners, ids: Int[Tensor, "n t"], mask: Int[Tensor, "n t"], cache: DynamicCache
    ) -> None:
        self.model, self.owners, self.ids, self.mask, self.cache = model, owners, ids, mask, cache
        self.prompts = list(range(len(ids)))
        self.answers: Int[Tensor, "n t"] = ids[:, :0]
        self._known = signature(model.forward).parameters

    def read_prompts(self) -> Float[Tensor, "n vocab"]:
        """Read the prompts, those of like length together, without shared padding; scores of the next token."""
        layers: Any = self.cache.layers
        lengths, parts = self.mask.sum(1).tolist(), []
        for rows in _alike(lengths):
            width = max(lengths[row] for row in rows)
            for layer in layers:
                layer.rows = rows
            ids, mask = self.ids[rows, -width:], self.mask[rows, -width:]
            last = torch.tensor([width - 1], device=ids.device)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            parts.append((rows, self._read(ids, mask, positions, [self.prompts[row] for row in rows], last)))
        for layer in layers:
            layer.close()
        scores = parts[0][1].new_empty(len(self.ids), parts[0][1].shape[1])
        for rows, some in parts:
            scores[rows] = some
        return scores

    def _read(
        self,
        tokens: Int[Tensor, "n t"],
        mask: Tensor,
        positions: Int[Tensor, "n t"],
        prompts: Sequence[int],
        wanted: Tensor | None = None,
        last: int = 1,
    ) -> Float[Tensor, "s vocab"]:
        """Scores after the last tokens of every row."""
        optional = {"position_ids": positions, "logits_to_keep": last}
        extra = {name: value for name, value in optional.items() if name in self._known}
        with self.owners(prompts, wanted):
            out = self.model(input_ids=tokens, attention_mask=mask, past_key_values=self.cache, use_cache=True, **extra)
        scores: Tensor = out.logits[:, -last:].flatten(0, 1)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def grow(self, beams: int) -> None:
        """So many beams for every prompt from here on."""
        self.answers = self.answers.repeat_interleave(beams, 0)
        self._grow(beams)

    def add(self, tokens: Int[Tensor, " n"]) -> Float[Tensor, "n vocab"]:
        """Add one token to every answer; scores of the next one."""
        self.answers = torch.cat([self.answers, tokens[:, None]], 1)
        return self._add(tokens)

    def keep(self, prompts: Bool[Tensor, " p"]) -> None:
        """Let go of all other prompts."""
        rows = prompts.repeat_interleave(len(self.answers) // len(prompts))
        self.answers = self.answers[rows]
        self._keep(prompts, rows)
        self.prompts = [prompt for prompt, stays in zip(self.prompts, prompts.tolist(), strict=True) if stays]

    def reorder(self, source: Int[Tensor, " n"]) -> None:
        """Go on from other beams of the same prompts."""
        self.answers = self.answers[source]
        self._reorder(source)

    def _grow(self, beams: int) -> None:
        self.cache.batch_repeat_interleave(beams)
        self.mask = self.mask.repeat_interleave(beams, 0)

    def _add(self, tokens: Int[Tensor, " n"]) -> Float[Tensor, "n vocab"]:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        return self._read(tokens[:, None], self.mask, self.mask.sum(1, keepdim=True) - 1, self.prompts)

    def _keep(self, prompts: Bool[Tensor, " p"], rows: Bool[Tensor, " n"]) -> None:
        self.cache.batch_select_indices(rows.nonzero()[:, 0])
        self.mask = self.mask[rows]

    def _reorder(self, source: Int[Tensor, " n"]) -> None:
        self.cache.reorder_cache(source)  # type: ignore[arg-type]


class Branched(Batch):
    """Beams of a prompt are branches of one row: nothing is kept twice, and nothing moves when beams change."""

    def _grow(self, beams: int) -> None:
        self._seen = self.mask.bool().repeat_interleave(beams, 0)

    def _add(self, tokens: Int[Tensor, " n"]) -> Float[Tensor, "n vocab"]:
        rows = len(self.prompts)
        beams = len(tokens) // rows
        itself = torch.eye(beams, dtype=torch.bool, device=tokens.device).repeat(rows, 1)
        self._seen = torch.cat([self._seen, itself], 1)
        seen = self._seen.view(rows, beams, -1)
        mask = additive(seen, self.model.dtype)
        return self._read(tokens.view(rows, beams), mask, seen.sum(2) - 1, self.prompts, last=beams)

    def _keep(self, prompts: Bool[Tensor, " p"], rows: Bool[Tensor, " n"]) -> None:
        self.cache.batch_select_indices(prompts.nonzero()[:, 0])
        self._seen = self._seen[rows]

    def _reorder(self, source: Int[Tensor, " n"]) -> None:
        self._seen = self._seen[source]


def _alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows of like length, longest first, in parts of ``_TOKENS`` with their padding; a part keeps the rows' order."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while order:
        fit = max(1, _TOKENS // max(1, lengths[order[0]]))
        yield sorted(order[:fit])
        order = order[fit:]
