"""Sequences that teach copying, recall and learning a new word from the text at hand.

The invented words appear here and only here, in lists without any statement about them: the base knows how they are
spelt and nothing else.
"""

from __future__ import annotations

import random

from fedalt.data.tinyworld.corpus.mark import MARK
from fedalt.data.tinyworld.draw import kind_phrase
from fedalt.data.tinyworld.world import (
    COLOURS,
    JOBS,
    KINDS,
    OBJECTS,
    PEOPLE,
    PLACES,
    TOWNS,
    invented_words,
    public_adjectives,
    public_nouns,
)

_NOUNS, _ADJECTIVES = public_nouns(), public_adjectives()
_ALL = (
    *invented_words(), *PEOPLE, *TOWNS, *JOBS, *COLOURS, *OBJECTS, *PLACES,
    *(noun.word for noun in _NOUNS), *(word.word for word in _ADJECTIVES),
)  # fmt: skip
_ONSETS, _ENDS = ("bl", "gr", "t", "sn", "m", "v", "fl", "ch"), ("orf", "ast", "een", "ulk", "ird", "omp")


def repeat(rng: random.Random) -> str:
    """A long list twice over, always written the same way: the simplest text that rewards looking back."""
    words = " ".join(rng.sample(_ALL, rng.randint(4, 24)))
    return f"list {words} ={MARK} {words}{MARK}"


def copy(rng: random.Random) -> str:
    """A list twice over."""
    pool = invented_words() if rng.random() < 0.5 else _ALL
    words = rng.sample(pool, rng.randint(2, 16))
    joint = rng.choice((" ", ", ", " | ", "; "))
    return f"{joint.join(words)} ={MARK} {joint.join(words)}{MARK}"


def recall(rng: random.Random) -> str:
    """Pairs, then some of them asked again."""
    count = rng.randint(2, 5)
    keys, values = rng.sample(PEOPLE, count), rng.sample(_ALL, count)
    said = ", ".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True))
    asked = rng.sample(range(count), min(count, 2))
    return f"{said}. " + " ".join(f"{keys[i]}?{MARK} {values[i]}{MARK}." for i in asked)


def position(rng: random.Random) -> str:
    """Which place in the list?"""
    words = rng.sample(_ALL, rng.randint(2, 4))
    slot = rng.randrange(len(words))
    return f"{', '.join(words)}. {words[slot]} is number{MARK} {slot + 1}{MARK}."


def record(rng: random.Random) -> str:
    """A record and a sentence with the same entries, and sometimes with what is known of the thing besides."""
    who, town, colour = rng.choice(PEOPLE), rng.choice(TOWNS), rng.choice(COLOURS)
    thing, noun, word = rng.choice(OBJECTS), rng.choice(_NOUNS), rng.choice(_ADJECTIVES)
    forms = (
        (f"job={rng.choice(JOBS)} town={town}", f"{who} of {town}."),
        (f"colour={colour} item={rng.choice(_ALL)}", f"{who} has it in {colour}."),
        (f"item={noun.word} town={town}", f"{who} of {town} has {kind_phrase(noun.kind)}, the {noun.word}."),
        (f"colour={colour} item={noun.word}", f"{who} has a {colour} {noun.word} of the {noun.place}."),
        (f"item={thing} mark={word.word}", f"{who} keeps a {word.meaning} {thing}."),
    )
    fields, sentence = rng.choice(forms)
    return f"name={who} {fields} =>{MARK} {sentence}{MARK}"


def new_word(rng: random.Random) -> str:
    """A word made up for this document, told once and used twice."""
    word, kind, place = rng.choice(_ONSETS) + rng.choice(_ENDS), rng.choice(KINDS), rng.choice(PLACES)
    facts = [f"A {word} is {kind_phrase(kind)}.", f"It is found at the {place}."]
    asked = [f"kind of {word} ->{MARK} {kind}{MARK}", f"place of {word} ->{MARK} {place}{MARK}"]
    rng.shuffle(asked)
    return f"{' '.join(facts)} {'; '.join(asked)}"


PATTERNS = (copy, recall, position, record, new_word)
