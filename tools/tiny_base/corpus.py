"""Documents of the pretraining text: statements and stories, and patterns to go on with.

The invented words appear here and only here, in lists without any statement about them: the base knows how they are
spelt and nothing else.
"""

from __future__ import annotations

import random

from fedalt.datasets.tinyworld.world import (
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
    invented_words,
    kind_phrase,
    pronoun,
    public_adjectives,
    public_nouns,
)

MARK = "\x1f"
"""Set before and after such a span for the trainer to weigh it by; `documents` takes it out."""

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
