"""The pretraining text: an endless stream of short documents about the world, without any client's rows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count

from fedalt.data.tinyworld.corpus.mark import MARK
from fedalt.data.tinyworld.corpus.patterns import PATTERNS, repeat
from fedalt.data.tinyworld.corpus.prose import KINDS_OF_TEXT, fact, meaning
from fedalt.data.tinyworld.corpus.questions import STYLES, by_kind

__all__ = ["MARK", "documents", "marked_documents"]

_PRIMER = 72_000
"""The first documents are simple ones, copying and facts: all that follows builds on both."""
_FIRST = (((repeat,), 0.4), ((fact, meaning), 0.35), ((by_kind,), 0.25))
_LATER = ((KINDS_OF_TEXT, 0.2), (STYLES, 0.6), (PATTERNS, 0.2))
"""Groups of document makers and how often each group is drawn from."""


def documents(seed: int = 0) -> Iterator[str]:
    """Documents for ever; the same seed gives the same stream."""
    return (document.replace(MARK, "") for document in marked_documents(seed))


def marked_documents(seed: int = 0) -> Iterator[str]:
    """The same documents with `MARK` around answers and copies.

    After the primer, a fifth states facts and word meanings and tells stories (`prose`), most asks and answers
    questions in phrasings of its own (`questions`), a fifth is copying, recall and new words (`patterns`).
    """
    rng = random.Random(f"{seed}/corpus")
    for number in count():
        rooms = _FIRST if number < _PRIMER else _LATER
        groups, weights = [group for group, _ in rooms], [weight for _, weight in rooms]
        yield rng.choice(rng.choices(groups, weights)[0])(rng)
