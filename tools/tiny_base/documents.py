"""The pretraining text, without any client's rows, and the tokenizer made from it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count, islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fedalt.datasets.tinyworld.world import invented_words
from tools.tiny_base.corpus import KINDS_OF_TEXT, MARK, PATTERNS, fact, meaning, repeat
from tools.tiny_base.questions import STYLES, by_kind

_PRIMER = 72_000
"""The first documents are simple ones, copying and facts: all that follows builds on both."""
_FIRST = (((repeat,), 0.4), ((fact, meaning), 0.35), ((by_kind,), 0.25))
_LATER = ((KINDS_OF_TEXT, 0.2), (STYLES, 0.6), (PATTERNS, 0.2))
"""Groups of document makers and how often each group is drawn from."""


def documents(seed: int = 0) -> Iterator[str]:
    """Documents for ever; the same seed gives the same stream."""
    return (document.replace(MARK, "") for document in marked_documents(seed))


def marked_documents(seed: int = 0) -> Iterator[str]:
    """The same documents with `MARK` around answers and copies.

    After the primer, a fifth states facts and word meanings and tells stories (`prose`), most asks and answers
    questions in phrasings of its own (`questions`), a fifth is copying, recall and new words (`patterns`).
    """
    rng = random.Random(f"{seed}/corpus")
    for number in count():
        rooms = _FIRST if number < _PRIMER else _LATER
        groups, weights = [group for group, _ in rooms], [weight for _, weight in rooms]
        yield rng.choice(rng.choices(groups, weights)[0])(rng)


PAD, EOS = "<pad>", "</s>"
VOCABULARY = 1024
CONTEXT = 1024
_TEMPLATE = "### Instruction:\nDoes it?\n\n### Response:\n"
"""In the tokenizer's text so that the prompt costs few tokens; the model is not pretrained on it."""


def train_tokenizer(seed: int = 0, count: int = 16_000) -> PreTrainedTokenizerFast:
    """A tokenizer from ``count`` documents, every eighth of the corpus, the prompt template and the invented words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = " ".join(invented_words())
    texts = [*islice(documents(seed), 0, 8 * count, 8), *[_TEMPLATE] * (count // 20), *[f" {words}"] * (count // 20)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
