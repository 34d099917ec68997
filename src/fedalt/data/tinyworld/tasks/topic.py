"""Text classification: what is a notice about? Slot 0 = animal, 1 = plant, 2 = food, 3 = tool."""

from __future__ import annotations

from fedalt.data.tinyworld.draw import Draft, Draw
from fedalt.data.tinyworld.world import COLOURS, KINDS, TOWNS

_NOTICE = (
    "Lost in {town}: a {colour} {noun}.",
    "{person} sells a {noun} in {town}.",
    "{colour} {noun} wanted, ask {person}.",
    "News from {town}: {person} got a {noun}.",
)
_TWO = (
    "For sale: a {noun} and a {other}.",
    "{person} has a {noun} and a {other} to give away.",
)


def draft(draw: Draw) -> Draft:
    """One notice; where it names two things, they are of one kind."""
    noun, person = draw.noun(), draw.people(1)[0]
    slot = KINDS.index(noun.kind)
    if draw.pick((True, True, False)):
        text = draw.pick(_NOTICE)
        return Draft(text.format(noun=noun.word, person=person, town=draw.pick(TOWNS), colour=draw.pick(COLOURS)), slot)
    other = draw.noun([noun.kind], avoid=[noun])
    return Draft(draw.pick(_TWO).format(noun=noun.word, other=other.word, person=person), slot)
