"""Questions about the public part of the world, answered by word, by number, or by a key given in the text.

The phrasings are not the clients', and no key outlives its document: the corpus teaches that an answer can be coded,
never which code.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from fedalt.datasets.tinyworld.world import (
    HABITS,
    KINDS,
    MEANINGS,
    OBJECTS,
    OPPOSITE,
    PEOPLE,
    PLACES,
    TOWNS,
    Adjective,
    Noun,
    kind_phrase,
    pronoun,
)
from tools.tiny_base.corpus import ADJECTIVES, MARK, NOUNS

LETTERS = "ABCDEFGH"
_JOINTS = (f" ->{MARK} ", f"\n{MARK}", f"\n={MARK} ")


@dataclass(frozen=True, slots=True)
class Question:
    """A text, its options in the order the text or the key has them, and the position of the right one."""

    text: str
    options: tuple[str, ...]
    slot: int


def _noun(rng: random.Random, kind: str) -> Noun:
    return rng.choice([noun for noun in NOUNS if noun.kind == kind])


def _adjective(rng: random.Random, meaning: str) -> Adjective:
    return rng.choice([word for word in ADJECTIVES if word.meaning == meaning])


def place(rng: random.Random) -> Question:
    """Where is it found?"""
    noun = rng.choice(NOUNS)
    options = [noun.place, *rng.sample([p for p in PLACES if p != noun.place], 2)]
    rng.shuffle(options)
    text = f"{', '.join(options)}: {rng.choice(('where is', 'what is the place of', 'go where for'))} the {noun.word}"
    return Question(text, tuple(options), options.index(noun.place))


def which_kind(rng: random.Random) -> Question:
    """Which of three is of the kind?"""
    kinds = rng.sample(KINDS, 3)
    options, slot = tuple(_noun(rng, kind).word for kind in kinds), rng.randrange(3)
    listed = rng.choice((", ".join(options), "{} or {} or {}".format(*options)))
    text = rng.choice((f"{listed}: find {kind_phrase(kinds[slot])}", f"{kinds[slot]} among {listed}"))
    return Question(text, options, slot)


def which_meaning(rng: random.Random) -> Question:
    """Which of three people has the thing described?"""
    meanings, people = rng.sample(MEANINGS, 3), tuple(rng.sample(PEOPLE, 3))
    slot, thing = rng.randrange(3), rng.choice(OBJECTS)
    said = [f"{p}'s is {_adjective(rng, m).word}" for p, m in zip(people, meanings, strict=True)]
    return Question(f"Each has a {thing}; {', '.join(said)}. The {meanings[slot]} one is with", people, slot)


def who(rng: random.Random) -> Question:
    """Which of three people is meant, by place, kind or town?"""
    people, slot, sort = tuple(rng.sample(PEOPLE, 3)), rng.randrange(3), rng.randrange(3)
    if sort == 0:
        values = rng.sample(TOWNS, 3)
        said, asked = [f"{p} of {v}" for p, v in zip(people, values, strict=True)], f"the one of {values[slot]} is"
    elif sort == 1:
        values = rng.sample(PLACES, 3)
        noun = rng.choice([noun for noun in NOUNS if noun.place == values[slot]])
        said, asked = [f"{p} by the {v}" for p, v in zip(people, values, strict=True)], f"near the {noun.word} is"
    else:
        values = rng.sample(KINDS, 3)
        said = [f"{p} with the {_noun(rng, v).word}" for p, v in zip(people, values, strict=True)]
        asked = f"the one with {kind_phrase(values[slot])} is"
    return Question(f"There were {', '.join(said)}; {asked}", people, slot)


def happier(rng: random.Random) -> Question:
    """Who of two was glad?"""
    people, meanings = tuple(rng.sample(PEOPLE, 2)), rng.sample(("good", "bad"), 2)
    thing, words = rng.choice(OBJECTS), [_adjective(rng, meaning).word for meaning in meanings]
    text = f"{people[0]}'s {thing} being {words[0]} and {people[1]}'s {words[1]}, glad was"
    return Question(text, people, meanings.index("good"))


def pronoun_of(rng: random.Random) -> Question:
    """Whom or what does a pronoun mean?"""
    person, kinds, slot = rng.choice(PEOPLE), rng.sample(KINDS, 2), rng.randrange(3)
    words = [_noun(rng, kind).word for kind in kinds]
    it, did = (pronoun(person), "was pleased") if slot == 0 else ("It", rng.choice(HABITS[kinds[slot - 1]]))
    text = f"{person} was with the {words[0]} and with the {words[1]}. {it} {did}; {it.lower()} being"
    return Question(text, (person, *words), slot)


def wanted(rng: random.Random) -> Question:
    """Which of two things does ``it`` mean, given what is said of it?"""
    person, things, word = rng.choice(PEOPLE), rng.sample(OBJECTS, 2), _adjective(rng, rng.choice(("good", "bad")))
    text = f"{person} chose the {things[0]} and left the {things[1]}, it being {word.word}; that is"
    return Question(text, (person, *things), 1 if word.meaning == "good" else 2)


def entails(rng: random.Random) -> Question:
    """Does a claim follow?"""
    slot, noun, person = rng.randrange(2), rng.choice(NOUNS), rng.choice(PEOPLE)
    if rng.random() < 0.4:
        word, thing = rng.choice(ADJECTIVES), rng.choice(OBJECTS)
        slot = rng.randrange(3)
        unclear = [m for m in MEANINGS if m not in (word.meaning, OPPOSITE[word.meaning])]
        claim = (word.meaning, OPPOSITE[word.meaning], rng.choice(unclear))[slot]
        text = f"{person}'s {thing} is {word.word}; is it {claim}?"
    elif rng.random() < 0.5:
        kind = noun.kind if slot == 0 else rng.choice([kind for kind in KINDS if kind != noun.kind])
        text = f"Is the {noun.word} {kind_phrase(kind)}?"
    else:
        spot = noun.place if slot == 0 else rng.choice([p for p in PLACES if p != noun.place])
        text = f"Is the {noun.word} found at the {spot}?"
    return Question(text, ("yes", "no", "maybe"), slot)


def same(rng: random.Random) -> Question:
    """Do two wordings agree?"""
    slot, (a, b) = rng.randrange(2), rng.sample(PEOPLE, 2)
    if rng.random() < 0.6:
        meanings = rng.sample(MEANINGS, 2)
        x, y = _adjective(rng, meanings[0]), _adjective(rng, meanings[slot])
        text = rng.choice((f"{x.word} and {y.word}", f"{x.word} {rng.choice(OBJECTS)}, {y.word} one"))
    else:
        word, (c, d) = rng.choice(NOUNS).word, ((a, b) if slot == 0 else (b, a))
        text = f"{a} gives {b} the {word}; {d} gets the {word} from {c}"
    return Question(f"{text}: same or not", ("same", "not"), slot)


def feeling(rng: random.Random) -> Question:
    """Is a remark praise, blame, or neither?"""
    meaning, thing = rng.choice(("good", "bad", rng.choice(("big", "small")))), rng.choice(OBJECTS)
    words = [_adjective(rng, meaning).word]
    if rng.random() < 0.4:
        words.append(_adjective(rng, rng.choice(("big", "small"))).word)
        rng.shuffle(words)
    text = f"a {', '.join(words)} {thing}, says {rng.choice(PEOPLE)}: praise or blame"
    return Question(text, ("praise", "blame", "neither"), {"good": 0, "bad": 1}.get(meaning, 2))


def sort_of(rng: random.Random) -> Question:
    """What kind is it, or what does it mean?"""
    if rng.random() < 0.6:
        noun = rng.choice(NOUNS)
        forms = (f"kind of {noun.word}", f"{rng.choice(PEOPLE)} buys the {noun.word}: it is", f"{noun.word} is")
        text = rng.choice(forms)
        return Question(text, KINDS, KINDS.index(noun.kind))
    word = rng.choice(ADJECTIVES)
    text = rng.choice((f"sense of {word.word}", f"{word.word} {rng.choice(OBJECTS)} is", f"{word.word} means"))
    return Question(text, MEANINGS, MEANINGS.index(word.meaning))


FAMILIES = (
    place, which_kind, which_meaning, who, happier, pronoun_of, wanted, entails, same, feeling, sort_of,
)  # fmt: skip


def by_kind(rng: random.Random) -> str:
    """The simplest question: what kind it is, or what it means."""
    question = sort_of(rng)
    return f"{question.text}{rng.choice(_JOINTS)}{question.options[question.slot]}{MARK}"


def by_word(rng: random.Random) -> str:
    """One question, answered by the option itself."""
    question = rng.choice(FAMILIES)(rng)
    return f"{question.text}{rng.choice(_JOINTS)}{question.options[question.slot]}{MARK}"


def by_number(rng: random.Random) -> str:
    """Some questions, answered by the option's number and the option."""
    joint, questions = rng.choice(_JOINTS), [rng.choice(FAMILIES)(rng) for _ in range(rng.randint(1, 4))]
    return "\n".join(f"{q.text}{joint}{q.slot + 1} {q.options[q.slot]}{MARK}" for q in questions)


def by_key(rng: random.Random) -> str:
    """A run of questions of one or two families, coded with letters under a key of this document alone."""
    families, by = rng.sample(FAMILIES, rng.randint(1, 2)), rng.randrange(len(LETTERS))
    keys = [LETTERS[(slot + by) % len(LETTERS)] for slot in range(4)]
    joint, told = rng.choice(_JOINTS), rng.random() < 0.5
    head = f"Key {' '.join(keys)}\n" if rng.random() < 0.7 else ""
    questions = [rng.choice(families)(rng) for _ in range(rng.randint(2, 6))]
    return head + "\n".join(f"{q.text}{joint}{keys[q.slot]}{f' {q.options[q.slot]}' * told}{MARK}" for q in questions)


STYLES = (by_word, by_number, by_key)
