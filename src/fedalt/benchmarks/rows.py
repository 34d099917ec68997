"""Rows in token ids: a model's own tokenizer, or a small deterministic one where the weights are random."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from itertools import cycle, islice

from torch import Tensor

from fedalt.benchmarks.task import Spec
from fedalt.data.encode import AnswerEncoder, Example, encode_client
from fedalt.data.load import load_federation
from fedalt.data.options import DataConfig

_PIECES = re.compile(r"\w{1,6}|[^\w\s]|\n")


class HashTokenizer:
    """Pieces of up to six letters, punctuation and line ends, hashed into a vocabulary.

    Lengths resemble those of a BPE (about four characters a token); ids mean nothing, which random weights do not mind.
    It has what ``AnswerEncoder`` and ``answer_all`` ask of a Hugging Face tokenizer.
    """

    pad_token_id = 0
    eos_token_id = 1
    _reserved = 2

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        """Token ids; there are no special tokens to add."""
        span = self.vocabulary - self._reserved
        return {"input_ids": [self._reserved + zlib.crc32(piece.encode()) % span for piece in _PIECES.findall(text)]}

    def batch_decode(self, ids: Tensor | Sequence[Sequence[int]], skip_special_tokens: bool = True) -> list[str]:
        """The ids themselves, as text."""
        rows: Iterable[Iterable[int]] = ids.tolist() if isinstance(ids, Tensor) else ids
        lowest = self._reserved if skip_special_tokens else 0
        return [" ".join(str(token) for token in row if token >= lowest) for row in rows]


def client_examples(
    spec: Spec, tokenizer: object, cutoff: int
) -> tuple[list[tuple[Example, ...]], list[tuple[Example, ...]]]:
    """Training and test rows of every client.

    With more clients than the federation has, client k gets the rows of client k mod n, each time the next ones.

    Raises:
        UserError: Something is wrong with the data.
    """
    data = DataConfig(source=spec.data)
    encoder = AnswerEncoder(tokenizer, data.template, cutoff)
    federation = load_federation(data, spec.seed)
    encoded = [encode_client(encoder, mine) for mine in list(federation.clients.values())[: spec.clients]]
    turns = [(encoded[k % len(encoded)], k // len(encoded)) for k in range(spec.clients)]
    train = [_window(mine.train, turn, spec.rows) for mine, turn in turns]
    test = [_window(mine.test, turn, spec.rows) for mine, turn in turns]
    return train, test


def _window(rows: Sequence[Example], turn: int, size: int) -> tuple[Example, ...]:
    start = turn * size % len(rows)
    return tuple(islice(cycle(rows), start, start + size))
