"""Reading comprehension: a short passage and a question. Answer: the letter for the person's position, and the name."""

from __future__ import annotations

from fedalt.data.tinyworld.draw import Draft, Draw, kind_phrase
from fedalt.data.tinyworld.world import KINDS, MEANINGS, PLACES, TOWNS

_OWNS = ("{a} has a {x}, {b} a {y} and {c} a {z}. Who has {q}?", "{a}: {x}, {b}: {y}, {c}: {z}. Who owns {q}?")
_WENT = (
    "{a} went to the {x}, {b} to the {y}, {c} to the {z}. Who found a {q}?",
    "{a} is at the {x}, {b} at the {y} and {c} at the {z}. Who sees a {q}?",
)
_MADE = (
    "The {t} of {a} is {x}, of {b} {y}, of {c} {z}. Whose is {q}?",
    "{a} has a {x} {t}, {b} a {y} one, {c} a {z} one. Who has the {q} {t}?",
)
_LIVES = (
    "{a} lives in {x}, {b} in {y} and {c} in {z}. Who is from {q}?",
    "{a} is from {x}, {b} from {y}, {c} from {z}. Who lives in {q}?",
)


def _answer(draw: Draw, form: str, words: list[str], questions: list[str], thing: str = "") -> Draft:
    people, slot = draw.people(3), draw.pick((0, 1, 2))
    names, facts = dict(zip("abc", people, strict=True)), dict(zip("xyz", words, strict=True))
    return Draft(form.format(**names, **facts, q=questions[slot], t=thing), slot, "{key} " + people[slot])


def _owns(draw: Draw) -> Draft:
    kinds = draw.some(KINDS, 3)
    return _answer(draw, draw.pick(_OWNS), [draw.noun([k]).word for k in kinds], [kind_phrase(k) for k in kinds])


def _went(draw: Draw) -> Draft:
    places = draw.some(PLACES, 3)
    nouns = [draw.noun(places=[place]).word for place in places]
    return _answer(draw, draw.pick(_WENT), places, nouns)


def _made(draw: Draw) -> Draft:
    meanings = draw.some(MEANINGS, 3)
    words = [draw.adjective([meaning]).word for meaning in meanings]
    return _answer(draw, draw.pick(_MADE), words, meanings, draw.thing())


def _lives(draw: Draw) -> Draft:
    towns = draw.some(TOWNS, 3)
    return _answer(draw, draw.pick(_LIVES), towns, towns)


def draft(draw: Draw) -> Draft:
    """One passage with its question."""
    return draw.pick((_owns, _went, _made, _lives))(draw)
