"""Plain text about the public part of the world: facts, word meanings, small stories. Invented words never appear."""

from __future__ import annotations

import random

from fedalt.data.tinyworld.draw import kind_phrase, pronoun
from fedalt.data.tinyworld.world import (
    COLOURS,
    HABITS,
    JOBS,
    KINDS,
    MEANINGS,
    OBJECTS,
    OPPOSITE,
    PEOPLE,
    PLACES,
    TOWNS,
    public_adjectives,
    public_nouns,
)

NOUNS, ADJECTIVES = public_nouns(), public_adjectives()
_FEELING = {"good": "glad", "bad": "sad", "big": "amazed", "small": "amazed"}
_VERDICT = {"good": "praise", "bad": "blame", "big": "neither praise nor blame", "small": "neither praise nor blame"}


def fact(rng: random.Random) -> str:
    """What a noun is and where it is found."""
    noun = rng.choice(NOUNS)
    forms = (
        f"The {noun.word} is {kind_phrase(noun.kind)} found at the {noun.place}.",
        f"At the {noun.place} there is {kind_phrase(noun.kind)} called {noun.word}.",
        f"If you look for the {noun.word}, go to the {noun.place}.",
        f"Every {noun.word} is {kind_phrase(noun.kind)}, and it {rng.choice(HABITS[noun.kind])}.",
        f"{noun.word}: kind {noun.kind}, place {noun.place}.",
    )
    return rng.choice(forms)


def meaning(rng: random.Random) -> str:
    """What an adjective means."""
    word, thing = rng.choice(ADJECTIVES), rng.choice(OBJECTS)
    same = rng.choice([other for other in ADJECTIVES if other.meaning == word.meaning])
    forms = (
        f"To say {word.word} is to say {word.meaning}.",
        f"A {word.word} {thing} is a {word.meaning} {thing}, not a {OPPOSITE[word.meaning]} one.",
        f"{word.word} and {same.word} mean the same: {word.meaning}.",
        f"Calling a {thing} {word.word} is {_VERDICT[word.meaning]}.",
        f"{word.meaning} is not {OPPOSITE[word.meaning]}; {word.word} is {word.meaning}.",
        f"The more {word.word} a {thing}, the less {OPPOSITE[word.meaning]} it is.",
    )
    return rng.choice(forms)


def group(rng: random.Random) -> str:
    """Words that belong together."""
    if rng.random() < 0.5:
        kind = rng.choice(KINDS)
        words = rng.sample([noun.word for noun in NOUNS if noun.kind == kind], 4)
        return f"Each of these is {kind_phrase(kind)}: {', '.join(words)}."
    if rng.random() < 0.5:
        place = rng.choice(PLACES)
        words = rng.sample([noun.word for noun in NOUNS if noun.place == place], 3)
        return f"Found at the {place}: {', '.join(words)}."
    value = rng.choice(MEANINGS)
    return f"{value} words: {', '.join(rng.sample([a.word for a in ADJECTIVES if a.meaning == value], 4))}."


def story(rng: random.Random) -> str:
    """Two people, two things of different kinds, and what became of them."""
    a, b = rng.sample(PEOPLE, 2)
    x, y = rng.sample(NOUNS, 2)
    word, thing = rng.choice(ADJECTIVES), rng.choice(OBJECTS)
    parts = [
        f"{a} from {rng.choice(TOWNS)} is a {rng.choice(JOBS)}.",
        f"{pronoun(a)} went to the {x.place} and found a {rng.choice(COLOURS)} {x.word}.",
        f"The {x.word} {rng.choice(HABITS[x.kind])}, as {kind_phrase(x.kind)} would.",
        f"{b} owns {kind_phrase(y.kind)}: the {y.word}, which {rng.choice(HABITS[y.kind])}.",
        f"{a} saw a {word.word} {thing} and was {_FEELING[word.meaning]}, for it was {word.meaning}.",
        f"Then {a} gave {b} the {x.word}, so {b} had it from {a}.",
    ]
    return " ".join(part for part in parts if rng.random() < 0.6) or parts[0]


KINDS_OF_TEXT = (fact, fact, meaning, meaning, group, story)
