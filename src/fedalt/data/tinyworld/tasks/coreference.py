"""Coreference: whom or what does the pronoun mean? Slot = position among the things mentioned, the person first."""

from __future__ import annotations

from fedalt.data.tinyworld.draw import Draft, Draw, pronoun
from fedalt.data.tinyworld.world import HABITS, KINDS, OBJECTS

_SCENE = (
    "{a} saw the {x} and the {y}.",
    "{a} came by the {x}, then the {y}.",
    "{a} asked about the {x} and also the {y}.",
)
_ASK = ("Who is {it}?", "{it} means what?", 'Who or what is "{it}"?')
_TASTE = (
    "{a} kept the {x}, not the {y}, because it was {z}.",
    "{a} took the {x} over the {y}, as it was {z}.",
)
_DEEDS = ("was glad", "went home", "had to laugh")


def _habit(draw: Draw) -> Draft:
    person = draw.people(1)[0]
    kinds = draw.some(KINDS, 2)
    x, y = (draw.noun([kind]).word for kind in kinds)
    slot = draw.pick((0, 1, 1, 2, 2))
    it, deed = (pronoun(person), draw.pick(_DEEDS)) if slot == 0 else ("It", draw.pick(HABITS[kinds[slot - 1]]))
    scene = draw.pick(_SCENE).format(a=person, x=x, y=y)
    return Draft(f"{scene} {it} {deed}. {draw.pick(_ASK).format(it=it)}", slot)


def _taste(draw: Draw) -> Draft:
    person = draw.people(1)[0]
    x, y = draw.some(OBJECTS, 2)
    adjective = draw.adjective(["good", "bad"])
    text = draw.pick(_TASTE).format(a=person, x=x, y=y, z=adjective.word)
    return Draft(f"{text} {draw.pick(_ASK).format(it='it')}", 1 if adjective.meaning == "good" else 2)


def draft(draw: Draw) -> Draft:
    """One question."""
    return draw.pick((_habit, _habit, _taste))(draw)
