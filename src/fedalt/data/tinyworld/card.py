"""The model card written beside tiny-base."""

from __future__ import annotations

from pathlib import Path

_CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# tiny-base

A Llama of {parameters:,} parameters, pretrained by this project's own recipe on text about a small closed world. It is the
frozen base model of fedalt's demo and tests: it opens offline in a moment and trains on a laptop's CPU.

| | |
|---|---|
| architecture | `LlamaForCausalLM`: 4 layers, width 256, feed-forward 640, 8 heads, tied embeddings, 1024 positions |
| tokenizer | byte-level BPE, {vocabulary} tokens, `<pad>` and `</s>`, no start mark; any text round-trips |
| weights | stored in float16, opened in float32 (`dtype` in `config.json`) |
| text | {tokens:,} tokens from `fedalt.data.tinyworld.corpus`, seed {seed}: facts, word meanings, stories, questions with answers, copying, recall |
| training | {steps} steps of 1,024 tokens, each read once (windows of 128, 256 and 512), AdamW, peak rate {peak:g}, {warmup} steps of warm-up, cosine; tokens of answers and copies count fivefold; matrix products in bfloat16 |
| held-out loss | {loss:.4f} nats per token (as stored, all tokens alike, windows of 256; {held_out:,} tokens never trained on; much of it is chance the text cannot foretell) |
| wall time | {minutes:.0f} minutes on {threads} CPU threads |
| licence | Apache-2.0; weights and text are the project's own, nothing was downloaded |

Made with

```
python -m fedalt.data.tinyworld.pretrain --out src/fedalt/assets/tiny_base --steps {steps} --seed {seed}
```

## What it knows
Of the shipped weights (5500 steps, seed 0), on 200 questions in the corpus' own phrasings: where a noun is found 100 %,
which of three nouns is of a kind 99 % (answers by word, chance 33 %). Weak: which of three people has the thing
described 53 %, which of three people is meant 40 %. Answering the same by number or by a letter whose key stands in
the text is at or little above chance (32 to 47 %). Copying lists failed at step 2000; not measured since.
Other kinds of question, and weights of any other run of the recipe, were not measured.

## What it was not shown
- The clients' rows of `fedalt.data.tinyworld.generate`, the prompt template (only the tokenizer saw it), or any key of
  letters that holds beyond one document.
- What the invented words mean. It met their spelling in lists to copy, so that each has a trained embedding.

## Limits
Not a language model of English: outside its world it knows nothing, it repeats itself, and its answers have no value.
Use it to test machinery and compare methods, for nothing else. The text is synthetic and names no real person.

## Repeatability
The same command on the same machine, with the same versions and thread count, is meant to give the same weights: text
and initial weights come from the seed. A full rerun has not been compared. {verified}
Other processors round bfloat16 products differently, so weights made elsewhere differ in their last digits.
"""  # noqa: E501 - table rows cannot be broken


def write_card(out: Path, verified: str, **numbers: float) -> None:
    """Write ``README.md`` into the model's folder; ``verified`` says what was checked of its repeatability."""
    (out / "README.md").write_text(_CARD.format(verified=verified, **numbers), encoding="utf-8")
