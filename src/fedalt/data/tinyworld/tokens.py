"""The tokenizer of tiny-base: byte-level BPE, so that any text goes in and comes back out unchanged."""

from __future__ import annotations

from itertools import islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fedalt.data.tinyworld.corpus import documents
from fedalt.data.tinyworld.world import invented_words

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
