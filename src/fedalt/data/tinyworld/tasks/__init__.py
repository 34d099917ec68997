"""The eight tasks, one per client, in the order of the clients' ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedalt.data.tinyworld.draw import Draft, Draw
from fedalt.data.tinyworld.tasks import (
    commonsense,
    coreference,
    inference,
    paraphrase,
    reading,
    sentiment,
    topic,
    verbalise,
)


@dataclass(frozen=True, slots=True)
class Task:
    """A task: the names its rows carry and the function that drafts one of them."""

    name: str
    category: str
    draft: Callable[[Draw], Draft]


TASKS = (
    Task("tiny_commonsense", "commonsense reasoning", commonsense.draft),
    Task("tiny_coreference", "coreference", coreference.draft),
    Task("tiny_inference", "natural language inference", inference.draft),
    Task("tiny_paraphrase", "paraphrase detection", paraphrase.draft),
    Task("tiny_reading", "reading comprehension", reading.draft),
    Task("tiny_sentiment", "sentiment", sentiment.draft),
    Task("tiny_verbalise", "struct-to-text", verbalise.draft),
    Task("tiny_topic", "text classification", topic.draft),
)
