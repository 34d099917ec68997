"""A key-value cache for answering many prompts: room for the answers from the start, rows that can leave it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class AnswerLayer(DynamicLayer):
    """One layer's keys and values ``[rows, heads, tokens, width]``, written in place.

    Hugging Face's own layer makes the whole cache anew for every token, and again for every choice of beams. Prompts
    are read some rows at a time: ``rows`` says which, and their tokens end where all prompts end.

    Args:
        rows: Number of prompts.
        prompt: Tokens of the longest prompt.
        room: Tokens of the longest answer.
    """

    def __init__(self, rows: int, prompt: int, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shape, self.prompt = (rows, prompt + room), prompt
        self.rows: list[int] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add tokens; returns all keys and values of the rows that are being read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, tokens = self.shape
            self._keys, self._values = (
                states.new_zeros(rows, states.shape[1], tokens, states.shape[3])
                for states in (key_states, value_states)
            )
        if self.rows is not None:
            first = self.prompt - key_states.shape[2]
            self._keys[self.rows, :, first : self.prompt] = key_states
            self._values[self.rows, :, first : self.prompt] = value_states
            return key_states, value_states
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        self._keys[:, :, start:end] = key_states
        self._values[:, :, start:end] = value_states
        self._look(end)
        return self.keys, self.values

    def close(self) -> None:
        """All prompts have been read; answers follow."""
        self.rows = None
        self._look(self.prompt)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Go on from other beams of the same prompts, whose prompts' keys and values are equal."""
        moved = (beam_idx != torch.arange(len(beam_idx), device=beam_idx.device)).nonzero()[:, 0]
        for buffer in (self._keys, self._values):
            answers = buffer[:, :, self.prompt : self.get_seq_length()]
            answers[moved] = answers[beam_idx[moved]]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times, for beams."""
        rows = torch.arange(len(self._keys), device=self._keys.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        length = self.get_seq_length()
        self._keys, self._values = self._keys[indices], self._values[indices]
        self._look(length)

    def _look(self, length: int) -> None:
        self.keys, self.values = self._keys[:, :, :length], self._values[:, :, :length]


def answer_cache(cache: Any, rows: int, prompt: int, room: int) -> DynamicCache | None:
    """An empty cache with room for answers, like the one a model asks for; nothing if that one is no ordinary one."""
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    mine = DynamicCache()
    mine.layers = [AnswerLayer(rows, prompt, room) for _ in cache.layers]
    return mine if cache.layers else None
