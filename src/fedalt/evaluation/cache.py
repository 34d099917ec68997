"""A key-value cache for answering many prompts: room for the answers from the start, rows that can leave it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class AnswerLayer(DynamicLayer):
    """One layer's keys and values ``[rows, heads, tokens, width]``, written in place.

    Hugging Face's own layer makes the whole cache anew for every token, and again for every choice of beams.

    Args:
        room: Tokens that will be added after the first call.
    """

    def __init__(self, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.room = room
        self.prompt = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add tokens; returns all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.prompt = key_states.shape[-2]
            shape = (*key_states.shape[:2], self.prompt + self.room)
            self._keys = key_states.new_empty(*shape, key_states.shape[-1])
            self._values = value_states.new_empty(*shape, value_states.shape[-1])
            self._look(0)
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        self._keys[:, :, start:end] = key_states
        self._values[:, :, start:end] = value_states
        self._look(end)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Go on from other beams of the same prompts, whose prompts' keys and values are equal."""
        for buffer in (self._keys, self._values):
            answers = buffer[:, :, self.prompt : self.get_seq_length()]
            answers.copy_(answers.index_select(0, beam_idx))

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


def answer_cache(cache: Any, room: int) -> DynamicCache | None:
    """An empty cache with room for answers, like the one a model asks for; nothing if that one is no ordinary one."""
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    mine = DynamicCache()
    mine.layers = [AnswerLayer(room) for _ in cache.layers]
    return mine if cache.layers else None
