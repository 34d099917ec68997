"""Commonsense reasoning: where things are found, what they are, what makes glad. Slot = position of the option."""

from __future__ import annotations

from fedalt.data.tinyworld.draw import Draft, Draw, kind_phrase
from fedalt.data.tinyworld.world import KINDS

_PLACE = (
    "Where do we find a {noun}: {options}?",
    "I need a {noun}. Where do I go, {options}?",
    "A {noun} comes from which place, {options}?",
)
_KIND = (
    "Which one is {kind}: {options}?",
    "Pick {kind} from {options}.",
    "Of {options}, which is {kind}?",
)
_DAY = (
    "{a} had a {x} day, {b} a {y} one. Who smiled?",
    "{a} got a {x} gift and {b} a {y} gift. Who was happy?",
    "{a} saw a {x} film, {b} a {y} film. Who would see it again?",
)


def _place(draw: Draw) -> Draft:
    noun = draw.noun()
    places = draw.places(noun.place, 3)
    options = "{}, {} or {}".format(*places)
    return Draft(draw.pick(_PLACE).format(noun=noun.word, options=options), places.index(noun.place))


def _kind(draw: Draw) -> Draft:
    kinds = draw.some(KINDS, 3)
    nouns = [draw.noun([kind]) for kind in kinds]
    slot = draw.pick((0, 1, 2))
    options = "{}, {} or {}".format(*[noun.word for noun in nouns])
    return Draft(draw.pick(_KIND).format(kind=kind_phrase(kinds[slot]), options=options), slot)


def _day(draw: Draw) -> Draft:
    a, b = draw.people(2)
    meanings = draw.shuffled(("good", "bad"))
    x, y = (draw.adjective([meaning]).word for meaning in meanings)
    return Draft(draw.pick(_DAY).format(a=a, b=b, x=x, y=y), meanings.index("good"))


def draft(draw: Draw) -> Draft:
    """One question."""
    return draw.pick((_place, _kind, _day))(draw)
