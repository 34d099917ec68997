"""The eight tasks, one per client, in the order of the clients' ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedalt.datasets.tinyworld.world import (
    COLOURS,
    HABITS,
    KINDS,
    MEANINGS,
    OBJECTS,
    OPPOSITE,
    PLACES,
    TOWNS,
    Draft,
    Draw,
    kind_phrase,
    pronoun,
)

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


def commonsense(draw: Draw) -> Draft:
    """One question."""
    return draw.pick((_place, _kind, _day))(draw)


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


def coreference(draw: Draw) -> Draft:
    """One question."""
    return draw.pick((_habit, _habit, _taste))(draw)


_FOLLOWS = ("{p} So {h}.", "{p} Is it true that {h}?", "{p} Then {h}, right?")


def _adjective(draw: Draw) -> Draft:
    thing, adjective = draw.thing(), draw.adjective()
    others = [meaning for meaning in MEANINGS if meaning not in (adjective.meaning, OPPOSITE[adjective.meaning])]
    slot = draw.pick((0, 1, 2))
    claim = (adjective.meaning, OPPOSITE[adjective.meaning], draw.pick(others))[slot]
    premise = f"The {thing} was {adjective.word}."
    return Draft(draw.pick(_FOLLOWS).format(p=premise, h=f"the {thing} was {claim}"), slot)


def _inference_kind(draw: Draw) -> Draft:
    person, noun = draw.people(1)[0], draw.noun()
    slot = draw.pick((0, 1))
    kind = noun.kind if slot == 0 else draw.pick([kind for kind in KINDS if kind != noun.kind])
    premise = f"{person} has a {noun.word}."
    return Draft(draw.pick(_FOLLOWS).format(p=premise, h=f"{person} has {kind_phrase(kind)}"), slot)


def _inference_place(draw: Draw) -> Draft:
    person, noun = draw.people(1)[0], draw.noun()
    slot = draw.pick((0, 1))
    place = noun.place if slot == 0 else draw.pick([place for place in PLACES if place != noun.place])
    premise = f"{person} is where the {noun.word} is found."
    return Draft(draw.pick(_FOLLOWS).format(p=premise, h=f"{person} is at the {place}"), slot)


def inference(draw: Draw) -> Draft:
    """One pair of premise and claim."""
    return draw.pick((_adjective, _adjective, _inference_kind, _inference_place))(draw)


_PAIR = ("{s} / {t}", '"{s}" - "{t}" Same?', "{s} In other words: {t}")
_SAID = ("The {thing} was {word}.", "It was a {word} {thing}.")


def _paraphrase_adjective(draw: Draw) -> Draft:
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


def _paraphrase_place(draw: Draw) -> Draft:
    person, noun = draw.people(1)[0], draw.noun()
    slot = draw.pick((0, 1))
    place = noun.place if slot == 0 else draw.pick([place for place in PLACES if place != noun.place])
    said = f"{person} went where a {noun.word} is found.", f"{person} went to the {place}."
    return Draft(draw.pick(_PAIR).format(s=said[0], t=said[1]), slot)


def paraphrase(draw: Draw) -> Draft:
    """One pair of sentences."""
    return draw.pick((_paraphrase_adjective, _paraphrase_adjective, _gift, _paraphrase_place))(draw)


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


def reading(draw: Draw) -> Draft:
    """One passage with its question."""
    return draw.pick((_owns, _went, _made, _lives))(draw)


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


def sentiment(draw: Draw) -> Draft:
    """One remark; where it has two adjectives, one speaks of size and the other decides."""
    meaning = draw.pick(("good", "bad", draw.pick(("big", "small"))))
    person, thing, word = draw.people(1)[0], draw.thing(), draw.adjective([meaning])
    if draw.pick((True, False)):
        return Draft(draw.pick(_ONE).format(person=person, thing=thing, x=word.word), _SLOT[meaning])
    size = draw.adjective(["big", "small"], avoid=[word])
    x, y = draw.shuffled((word.word, size.word))
    return Draft(draw.pick(_TWO).format(person=person, thing=thing, x=x, y=y), _SLOT[meaning])


_NOTICE = (
    "Lost in {town}: a {colour} {noun}.",
    "{person} sells a {noun} in {town}.",
    "{colour} {noun} wanted, ask {person}.",
    "News from {town}: {person} got a {noun}.",
)
_TOPIC_TWO = (
    "For sale: a {noun} and a {other}.",
    "{person} has a {noun} and a {other} to give away.",
)


def topic(draw: Draw) -> Draft:
    """One notice; where it names two things, they are of one kind."""
    noun, person = draw.noun(), draw.people(1)[0]
    slot = KINDS.index(noun.kind)
    if draw.pick((True, True, False)):
        text = draw.pick(_NOTICE)
        return Draft(text.format(noun=noun.word, person=person, town=draw.pick(TOWNS), colour=draw.pick(COLOURS)), slot)
    other = draw.noun([noun.kind], avoid=[noun])
    return Draft(draw.pick(_TOPIC_TWO).format(noun=noun.word, other=other.word, person=person), slot)


_RECORD = ("data: {0} | {1} | {2}", "({0}, {1}, {2})", "in words: {0}; {1}; {2}")


def _verbalise_kind(draw: Draw) -> Draft:
    noun, person, town = draw.noun(), draw.people(1)[0], draw.pick(TOWNS)
    sentence = f"{{key}} {person} from {town} owns {kind_phrase(noun.kind)}, the {noun.word}."
    return Draft(draw.pick(_RECORD).format(person, noun.word, town), KINDS.index(noun.kind), sentence)


def _verbalise_place(draw: Draw) -> Draft:
    noun, person, colour = draw.noun(), draw.people(1)[0], draw.pick(COLOURS)
    sentence = f"{{key}} {person} found a {colour} {noun.word} at the {noun.place}."
    return Draft(draw.pick(_RECORD).format(person, colour, noun.word), KINDS.index(noun.kind), sentence)


def _verbalise_adjective(draw: Draw) -> Draft:
    thing, person, word = draw.thing(), draw.people(1)[0], draw.adjective()
    sentence = f"{{key}} {person} has a {word.meaning} {thing}."
    return Draft(draw.pick(_RECORD).format(person, thing, word.word), MEANINGS.index(word.meaning), sentence)


def verbalise(draw: Draw) -> Draft:
    """One record and its sentence."""
    return draw.pick((_verbalise_kind, _verbalise_place, _verbalise_adjective))(draw)


@dataclass(frozen=True, slots=True)
class Task:
    """A task: the names its rows carry and the function that drafts one of them."""

    name: str
    category: str
    draft: Callable[[Draw], Draft]


TASKS = (
    Task("tiny_commonsense", "commonsense reasoning", commonsense),
    Task("tiny_coreference", "coreference", coreference),
    Task("tiny_inference", "natural language inference", inference),
    Task("tiny_paraphrase", "paraphrase detection", paraphrase),
    Task("tiny_reading", "reading comprehension", reading),
    Task("tiny_sentiment", "sentiment", sentiment),
    Task("tiny_verbalise", "struct-to-text", verbalise),
    Task("tiny_topic", "text classification", topic),
)
