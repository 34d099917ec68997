"""How the records of each task are put into words: several phrasings, one of which is drawn for every row.

The style is FLAN's: a question around the record's fields, then an ``OPTIONS:`` list where there are options.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

WORDINGS: dict[str, tuple[str, ...]] = {
    "ag_news_subset": (
        "{text}\n\nWhich section of a newspaper does this belong to?",
        "Read this news item.\n\n{text}\n\nWhat is it about?",
        "Sort the following article by subject.\n\n{text}",
        'An editor must file "{text}" under one heading. Which one fits best?',
        "News: {text}\nTopic?",
    ),
    "snli": (
        'Suppose it is true that "{premise}" Does it follow that "{hypothesis}"?',
        "{premise}\n\nGiven only this, is the next statement true?\n{hypothesis}",
        "Known: {premise}\nClaim: {hypothesis}\nDoes what is known settle the claim?",
        'Someone sees the scene "{premise}" and says "{hypothesis}" Are they right?',
        "First sentence: {premise}\nSecond sentence: {hypothesis}\n\nMay the second be inferred from the first?",
    ),
    "openbookqa": (
        "{question}",
        "Use what you know of elementary science to finish or answer this: {question}",
        "Pick the best continuation or answer.\n\n{question}",
        "Science quiz: {question}\nWhich choice is right?",
    ),
    "glue_mrpc": (
        "{one}\n{other}\n\nDo these two sentences say the same thing?",
        "Compare the sentences.\nA: {one}\nB: {other}\nIs B a paraphrase of A?",
        'Does "{one}" have the same meaning as "{other}"?',
        "Two reporters wrote:\n- first: {one}\n- second: {other}\nDid they report the same facts?",
    ),
    "story_cloze": (
        "{story}\n\nHow does the story end?",
        "Here are four sentences of a story: {story}\nWhich fifth sentence makes sense?",
        "Choose the more plausible ending.\n\n{story}",
        "{story}\nWhat happened then?",
    ),
    "common_gen": (
        "Write one sentence of everyday life that has all of these words in it: {concepts}",
        "Words: {concepts}\nMake a sentence with them.",
        "Describe a common scene in which the following occur together: {concepts}.",
        "{concepts}\n\nTurn this list into a natural sentence.",
    ),
    "sentiment140": (
        "{text}\n\nIs the mood of this tweet good or bad?",
        "Somebody posted: {text}\nHow did they feel?",
        'What sentiment does the message "{text}" express?',
        "Label the feeling behind this short message.\n\n{text}",
    ),
    "definite_pronoun_resolution": (
        '{sentence}\n\nWhom or what does "{pronoun}" stand for?',
        'In the sentence below, "{pronoun}" refers to somebody or something named before. To which?\n{sentence}',
        'Resolve the pronoun "{pronoun}": {sentence}',
        'Sentence: {sentence}\nQuestion: "{pronoun}" means',
    ),
}


def instruction(wording: str, fields: Mapping[str, str], options: Sequence[str]) -> str:
    """The question, and the options below it."""
    question = wording.format_map(fields)
    return "\n".join([question, "", "OPTIONS:", *(f"- {option}" for option in options)]) if options else question
