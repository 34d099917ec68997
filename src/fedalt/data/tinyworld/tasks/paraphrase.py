"""Paraphrase detection. Slot 0 = the two sentences say the same, 1 = they do not."""

from __future__ import annotations

from fedalt.data.tinyworld.draw import Draft, Draw
from fedalt.data.tinyworld.world import MEANINGS, PLACES

_PAIR = ("{s} / {t}", '"{s}" - "{t}" Same?', "{s} In other words: {t}")
_SAID = ("The {thing} was {word}.", "It was a {word} {thing}.")


def _adjective(draw: Draw) -> Draft:
    thing, first = draw.thing(), draw.adjective()
    slot = draw.pick((0, 1))
    others = [meaning for meaning in MEANINGS if meaning != first.meaning]
    second = draw.adjective([first.meaning] if slot == 0 else others, avoid=[first])
    forms = zip(draw.shuffled(_SAID), (first, second), strict=True)
    said = [form.format(thing=thing, word=word.word) for form, word in forms]
    return Draft(draw.pick(_PAIR).format(s=said[0], t=said[1]), slot)


def _gift(draw: Draw) -> Draft:
    a, b = draw.people(2)
    noun, slot = draw.noun(), draw.pick((0, 1))
    giver, taker = (a, b) if slot == 0 else (b, a)
    said = f"{a} gave {b} a {noun.word}.", f"{taker} got a {noun.word} from {giver}."
    return Draft(draw.pick(_PAIR).format(s=said[0], t=said[1]), slot)


def _place(draw: Draw) -> Draft:
    person, noun = draw.people(1)[0], draw.noun()
    slot = draw.pick((0, 1))
    place = noun.place if slot == 0 else draw.pick([place for place in PLACES if place != noun.place])
    said = f"{person} went where a {noun.word} is found.", f"{person} went to the {place}."
    return Draft(draw.pick(_PAIR).format(s=said[0], t=said[1]), slot)


def draft(draw: Draw) -> Draft:
    """One pair of sentences."""
    return draw.pick((_adjective, _adjective, _gift, _place))(draw)
