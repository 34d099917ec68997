"""The text of every token, so that together they are the text of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What every token adds to the text; a token that ends inside a character adds nothing, the next one the whole."""
    parts, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        unfinished = text.endswith("\ufffd") and end < len(ids)
        parts.append("" if unfinished else text[len(before) :])
        before = before if unfinished else text
    return parts
