"""Sentiment of a remark. Slot 0 = positive, 1 = negative, 2 = neither (only size is spoken of)."""

from __future__ import annotations

from fedalt.data.tinyworld.draw import Draft, Draw

_ONE = (
    "The {thing} was {x}.",
    "What a {x} {thing}!",
    "{person}: my {thing} is so {x}.",
    "{person} told me the {thing} is {x}.",
)
_TWO = (
    "The {thing} was {x} and {y}.",
    "A {x} {thing}, and {y} too!",
    "{person} thinks the {thing} is {x}, even {y}.",
)
_SLOT = {"good": 0, "bad": 1, "big": 2, "small": 2}


def draft(draw: Draw) -> Draft:
    """One remark; where it has two adjectives, one speaks of size and the other decides."""
    meaning = draw.pick(("good", "bad", draw.pick(("big", "small"))))
    person, thing, word = draw.people(1)[0], draw.thing(), draw.adjective([meaning])
    if draw.pick((True, False)):
        return Draft(draw.pick(_ONE).format(person=person, thing=thing, x=word.word), _SLOT[meaning])
    size = draw.adjective(["big", "small"], avoid=[word])
    x, y = draw.shuffled((word.word, size.word))
    return Draft(draw.pick(_TWO).format(person=person, thing=thing, x=x, y=y), _SLOT[meaning])
