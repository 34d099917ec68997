"""Natural language inference. Slot 0 = follows, 1 = contradicts, 2 = cannot be told."""

from __future__ import annotations

from fedalt.data.tinyworld.draw import Draft, Draw, kind_phrase
from fedalt.data.tinyworld.world import KINDS, MEANINGS, OPPOSITE, PLACES

_FOLLOWS = ("{p} So {h}.", "{p} Is it true that {h}?", "{p} Then {h}, right?")


def _adjective(draw: Draw) -> Draft:
    thing, adjective = draw.thing(), draw.adjective()
    others = [meaning for meaning in MEANINGS if meaning not in (adjective.meaning, OPPOSITE[adjective.meaning])]
    slot = draw.pick((0, 1, 2))
    claim = (adjective.meaning, OPPOSITE[adjective.meaning], draw.pick(others))[slot]
    premise = f"The {thing} was {adjective.word}."
    return Draft(draw.pick(_FOLLOWS).format(p=premise, h=f"the {thing} was {claim}"), slot)


def _kind(draw: Draw) -> Draft:
    person, noun = draw.people(1)[0], draw.noun()
    slot = draw.pick((0, 1))
    kind = noun.kind if slot == 0 else draw.pick([kind for kind in KINDS if kind != noun.kind])
    premise = f"{person} has a {noun.word}."
    return Draft(draw.pick(_FOLLOWS).format(p=premise, h=f"{person} has {kind_phrase(kind)}"), slot)


def _place(draw: Draw) -> Draft:
    person, noun = draw.people(1)[0], draw.noun()
    slot = draw.pick((0, 1))
    place = noun.place if slot == 0 else draw.pick([place for place in PLACES if place != noun.place])
    premise = f"{person} is where the {noun.word} is found."
    return Draft(draw.pick(_FOLLOWS).format(p=premise, h=f"{person} is at the {place}"), slot)


def draft(draw: Draw) -> Draft:
    """One pair of premise and claim."""
    return draw.pick((_adjective, _adjective, _kind, _place))(draw)
