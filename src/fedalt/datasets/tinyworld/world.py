"""The closed world: its people, towns, things and words, and what is true of them.

Two layers of words::

    public    ordinary nouns and adjectives; the pretraining corpus states their facts
    invented  ``dax``, ``vimo``, ...; the corpus shows their spelling only, clients' rows give them away

A noun has a kind and a place where it is found; an adjective means one of four plain words. What an invented word
means is drawn from the seed, so another seed is another world with the same spelling.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

CLIENTS = 8
HOLDERS = 4
"""How many clients meet a given invented word in training; the others meet it in validation and test only."""

KINDS = ("animal", "plant", "food", "tool")
PLACES = ("river", "forest", "kitchen", "barn", "market", "hill")
MEANINGS = ("good", "bad", "big", "small")
OPPOSITE = {"good": "bad", "bad": "good", "big": "small", "small": "big"}

WOMEN = ("Ann", "Mia", "Eva", "Lena", "Rosa", "Nora", "Kim", "Jane")
MEN = ("Tom", "Max", "Ben", "Karl", "Paul", "Hugo", "Sam", "Dan")
PEOPLE = WOMEN + MEN
TOWNS = ("Rome", "Oslo", "Bonn", "Lima", "Cork", "Bath", "Kyoto", "Paris")
JOBS = ("baker", "farmer", "doctor", "teacher", "miner", "painter", "driver", "cook")
COLOURS = ("red", "blue", "green", "white", "black", "brown")
OBJECTS = ("room", "day", "house", "film", "song", "boat", "coat", "game", "book", "gift")

HABITS = {
    "animal": ("ran away", "was asleep", "had babies"),
    "plant": ("grew leaves", "needed rain", "had roots"),
    "food": ("was eaten", "tasted sweet", "was cooked"),
    "tool": ("was repaired", "lost its handle", "was used for work"),
}
"""What only things of one kind do."""

_PUBLIC_NOUNS = {
    "animal": """
        cat kitchen, cow barn, fish river, fox forest, goat hill,
        horse barn, hen market, wolf forest, frog river, sheep hill
    """,
    "plant": """
        tree forest, rose market, reed river, fern forest, bush hill,
        herb kitchen, moss hill, weed barn, lily river, vine hill
    """,
    "food": """
        bread kitchen, soup kitchen, cheese market, rice market, cake kitchen,
        nut forest, pie barn, berry hill, salt river, corn barn
    """,
    "tool": """
        knife kitchen, net river, saw forest, plough barn, scale market,
        rope barn, spade hill, pan kitchen, trap forest, cart market
    """,
}
"""Per kind: the noun and its place."""
_PUBLIC_ADJECTIVES = {
    "good": "nice,great,lovely,fine,sweet,super",
    "bad": "awful,poor,nasty,dull,sad,ugly",
    "big": "large,huge,giant,tall,vast,wide",
    "small": "tiny,little,short,mini,thin,slim",
}
_INVENTED_NOUNS = """
    dax wug fep gorp zib tulf nark bosk mip kell plon drib sked vost trum hod
    yarp lut quen gam snib pold roke fint crul jash bem zork tavi moff lirp keb
"""
_INVENTED_ADJECTIVES = """
    vimo rulo zani pelo gubi tavo nelu hobi miro kulo dapi soru lenu fago wiru jebo
    baru nifo tomi gelo puvi kani rudo zelu higo lapu vero danu sibo mofu wabi teko
"""


@dataclass(frozen=True, slots=True)
class Noun:
    """A thing of the world: what it is called, what kind it is, where it is found."""

    word: str
    kind: str
    place: str


@dataclass(frozen=True, slots=True)
class Adjective:
    """An adjective and the plain word of `MEANINGS` it stands for."""

    word: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Words:
    """The nouns and adjectives one split may use, public and invented apart."""

    public_nouns: tuple[Noun, ...]
    public_adjectives: tuple[Adjective, ...]
    nouns: tuple[Noun, ...]
    adjectives: tuple[Adjective, ...]


def public_nouns() -> tuple[Noun, ...]:
    """Every ordinary noun with its kind and place."""
    pairs = [(kind, entry.split()) for kind, entries in _PUBLIC_NOUNS.items() for entry in entries.split(",")]
    return tuple(Noun(word, kind, place) for kind, (word, place) in pairs)


def public_adjectives() -> tuple[Adjective, ...]:
    """Every ordinary adjective, each plain word among them, with its meaning."""
    pairs = [(word, meaning) for meaning, words in _PUBLIC_ADJECTIVES.items() for word in [meaning, *words.split(",")]]
    return tuple(Adjective(word, meaning) for word, meaning in pairs)


def invented_words() -> tuple[str, ...]:
    """The spelling of every invented word; nouns first."""
    return (*_INVENTED_NOUNS.split(), *_INVENTED_ADJECTIVES.split())


def _dealt(values: tuple[str, ...], count: int, rng: random.Random) -> list[str]:
    """``count`` values, each of ``values`` equally often (as far as that divides), in random order."""
    dealt = [values[i % len(values)] for i in range(count)]
    rng.shuffle(dealt)
    return dealt


def _invent(seed: int) -> tuple[tuple[Noun, ...], tuple[Adjective, ...]]:
    names, words = _INVENTED_NOUNS.split(), _INVENTED_ADJECTIVES.split()
    rng = random.Random(f"{seed}/invent")
    kinds = _dealt(KINDS, len(names), rng)
    places = _dealt(PLACES, len(names), rng)
    meanings = _dealt(MEANINGS, len(words), rng)
    nouns = tuple(Noun(*entry) for entry in zip(names, kinds, places, strict=True))
    adjectives = tuple(Adjective(*entry) for entry in zip(words, meanings, strict=True))
    return nouns, adjectives


def all_words(seed: int) -> Words:
    """Everything that can be talked about in the world of this seed."""
    nouns, adjectives = _invent(seed)
    return Words(public_nouns(), public_adjectives(), nouns, adjectives)


def known_words(seed: int, client: int) -> Words:
    """What one client talks about in training: all public words, and the invented ones it holds (about half)."""
    words, held = all_words(seed), random.Random(f"{seed}/holders")
    holds = [client in held.sample(range(CLIENTS), HOLDERS) for _ in (*words.nouns, *words.adjectives)]
    nouns = tuple(noun for noun, keep in zip(words.nouns, holds, strict=False) if keep)
    kept = holds[len(words.nouns) :]
    adjectives = tuple(adjective for adjective, keep in zip(words.adjectives, kept, strict=True) if keep)
    return Words(words.public_nouns, words.public_adjectives, nouns, adjectives)


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
