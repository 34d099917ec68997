"""Drawing words for a row: the one source of randomness every task reads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from fedalt.data.tinyworld.world import MEN, OBJECTS, PEOPLE, PLACES, Adjective, Noun, Words

T = TypeVar("T")
INVENTED = 0.8
"""How often a word is an invented one, where an invented one fits."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A row before a convention is applied.

    Attributes:
        instruction: The text, the same under every convention.
        slot: Which option or verdict is right.
        answer: The answer, with ``{key}`` where the letter for the slot goes.
    """

    instruction: str
    slot: int
    answer: str = "{key}"


class Draw:
    """Random choices over one split's words."""

    def __init__(self, words: Words, rng: random.Random) -> None:
        self._words, self._rng = words, rng

    def pick(self, options: Sequence[T]) -> T:
        """One of the options."""
        return self._rng.choice(options)

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """Several different options, in random order."""
        return self._rng.sample(options, count)

    def people(self, count: int) -> list[str]:
        """Different people."""
        return self.some(PEOPLE, count)

    def thing(self) -> str:
        """An object an adjective can be said of."""
        return self.pick(OBJECTS)

    def noun(self, kinds: Sequence[str] = (), places: Sequence[str] = (), avoid: Sequence[Noun] = ()) -> Noun:
        """A noun of one of the kinds, found at one of the places (default: any)."""

        def fits(noun: Noun) -> bool:
            return noun not in avoid and (not kinds or noun.kind in kinds) and (not places or noun.place in places)

        words = self._words
        return self._mixed([n for n in words.nouns if fits(n)], [n for n in words.public_nouns if fits(n)])

    def adjective(self, meanings: Sequence[str] = (), avoid: Sequence[Adjective] = ()) -> Adjective:
        """An adjective with one of the meanings (default: any)."""

        def fits(word: Adjective) -> bool:
            return (not meanings or word.meaning in meanings) and word not in avoid

        words = self._words
        return self._mixed([a for a in words.adjectives if fits(a)], [a for a in words.public_adjectives if fits(a)])

    def places(self, including: str, count: int) -> list[str]:
        """Different places, one of them given, in random order."""
        chosen = [including, *self.some([place for place in PLACES if place != including], count - 1)]
        self._rng.shuffle(chosen)
        return chosen

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in random order."""
        return self.some(items, len(items))

    def _mixed(self, invented: Sequence[T], public: Sequence[T]) -> T:
        wanted = self._rng.random() < INVENTED
        return self.pick(invented if invented and wanted else public)


def pronoun(person: str) -> str:
    """``He`` or ``She``."""
    return "He" if person in MEN else "She"


def kind_phrase(kind: str) -> str:
    """The kind with its article: ``an animal``, ``a tool``."""
    return f"an {kind}" if kind == "animal" else f"a {kind}"
