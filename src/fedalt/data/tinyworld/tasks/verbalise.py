"""Struct-to-text: a record becomes a sentence filed under a letter. Slot = kind of the thing or sense of the word."""

from __future__ import annotations

from fedalt.data.tinyworld.draw import Draft, Draw, kind_phrase
from fedalt.data.tinyworld.world import COLOURS, KINDS, MEANINGS, TOWNS

_RECORD = ("data: {0} | {1} | {2}", "({0}, {1}, {2})", "in words: {0}; {1}; {2}")


def _kind(draw: Draw) -> Draft:
    noun, person, town = draw.noun(), draw.people(1)[0], draw.pick(TOWNS)
    sentence = f"{{key}} {person} from {town} owns {kind_phrase(noun.kind)}, the {noun.word}."
    return Draft(draw.pick(_RECORD).format(person, noun.word, town), KINDS.index(noun.kind), sentence)


def _place(draw: Draw) -> Draft:
    noun, person, colour = draw.noun(), draw.people(1)[0], draw.pick(COLOURS)
    sentence = f"{{key}} {person} found a {colour} {noun.word} at the {noun.place}."
    return Draft(draw.pick(_RECORD).format(person, colour, noun.word), KINDS.index(noun.kind), sentence)


def _adjective(draw: Draw) -> Draft:
    thing, person, word = draw.thing(), draw.people(1)[0], draw.adjective()
    sentence = f"{{key}} {person} has a {word.meaning} {thing}."
    return Draft(draw.pick(_RECORD).format(person, thing, word.word), MEANINGS.index(word.meaning), sentence)


def draft(draw: Draw) -> Draft:
    """One record and its sentence."""
    return draw.pick((_kind, _place, _adjective))(draw)
