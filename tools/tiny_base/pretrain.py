"""Make tiny-base, the small Llama the demo and the tests start from: ``python -m tools.tiny_base.pretrain``.

documents → tokenizer → one long line of tokens, ``</s>`` after each document → windows of 256 or 512 → AdamW
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.tiny_base.corpus import MARK
from tools.tiny_base.documents import CONTEXT, marked_documents, train_tokenizer

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
| text | {tokens:,} tokens from `tools.tiny_base.documents`, seed {seed}: facts, word meanings, stories, questions with answers, copying, recall |
| training | {steps} steps of 1,024 tokens, each read once (windows of 128, 256 and 512), AdamW, peak rate {peak:g}, {warmup} steps of warm-up, cosine; tokens of answers and copies count fivefold; matrix products in bfloat16 |
| held-out loss | {loss:.4f} nats per token (as stored, all tokens alike, windows of 256; {held_out:,} tokens never trained on; much of it is chance the text cannot foretell) |
| wall time | {minutes:.0f} minutes on {threads} CPU threads |
| licence | Apache-2.0; weights and text are the project's own, nothing was downloaded |

Made with

```
python -m tools.tiny_base.pretrain --out src/fedalt/assets/tiny_base --steps {steps} --seed {seed}
```

## What it knows
Of the shipped weights (5500 steps, seed 0), on 200 questions in the corpus' own phrasings: where a noun is found 100 %,
which of three nouns is of a kind 99 % (answers by word, chance 33 %). Weak: which of three people has the thing
described 53 %, which of three people is meant 40 %. Answering the same by number or by a letter whose key stands in
the text is at or little above chance (32 to 47 %). Copying lists failed at step 2000; not measured since.
Other kinds of question, and weights of any other run of the recipe, were not measured.

## What it was not shown
- The clients' rows of `fedalt.datasets.tinyworld.generate`, the prompt template (only the tokenizer saw it), or any key of
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


WINDOWS = (128, 128, 128, 256, 128, 128, 256, 512)
"""Window lengths, one per step in turn. Every step reads the next 1024 tokens of the line, cut into windows."""
TOKENS_PER_STEP = 1024
ANSWER_WEIGHT = 5.0
"""What a token of an answer counts in the loss; any other counts 1."""
HELD_OUT = 100
"""Steps' worth of tokens at the end of the stream that are never trained on; the final loss is measured there."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a run depends on.

    Attributes:
        steps: Optimiser steps.
        seed: Seed of text, initial weights and windows.
        peak: Highest learning rate, after ``warmup`` steps of linear rise and before cosine decay to a twentieth.
        warmup: Steps of linear rise.
        threads: CPU threads; another number may change the last bits of the weights.
    """

    steps: int = 5500
    seed: int = 0
    peak: float = 1.2e-3
    warmup: int = 100
    threads: int = 2


def rate(step: int, recipe: Recipe) -> float:
    """Learning rate of a step: linear warm-up, then cosine to ``peak / 20``."""
    rise = min(1.0, (step + 1) / recipe.warmup)
    done = step / max(1, recipe.steps)
    return recipe.peak * rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def token_line(tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` tokens of the corpus, an end mark after each document, and each token's weight; shapes ``[count]``."""
    line, weight, stream = list[int](), list[float](), marked_documents(seed)
    while len(line) < count:
        parts = [next(stream).split(MARK) for _ in range(500)]  # text, answer, text, answer, ..., text
        spans = iter(tokenizer([span for document in parts for span in document])["input_ids"])
        for document in parts:
            for index in range(len(document)):
                ids = next(spans)
                line.extend(ids)
                weight.extend([ANSWER_WEIGHT if index % 2 else 1.0] * len(ids))
            line.append(tokenizer.eos_token_id)
            weight.append(1.0)
    return torch.tensor(line[:count]), torch.tensor(weight[:count])


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """The untrained model, about 3.3 million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        initializer_range=0.06,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, line: Tensor, weight: Tensor, recipe: Recipe, out: Path) -> None:
    """Next-token training with AdamW; prints a line every 100 steps, writes the weights every 1000."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimiser, begun = torch.optim.AdamW(groups, lr=recipe.peak, betas=(0.9, 0.95), fused=True), time.monotonic()
    for step in range(recipe.steps):
        here, length = slice(step * TOKENS_PER_STEP, (step + 1) * TOKENS_PER_STEP), WINDOWS[step % len(WINDOWS)]
        ids, weights = line[here].view(-1, length), weight[here].view(-1, length)  # [b, length]
        loss = _step(model, ids, weights, optimiser, rate(step, recipe))
        if step % 100 == 0 or step == recipe.steps - 1:
            print(f"step {step:5d}  loss {loss:.4f}  {time.monotonic() - begun:6.0f} s", flush=True)
        if step % 1000 == 999:
            save_weights(model, out)


def _step(model: LlamaForCausalLM, ids: Tensor, weight: Tensor, optimiser: torch.optim.Optimizer, lr: float) -> float:
    for group in optimiser.param_groups:
        group["lr"] = lr
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids).logits[:, :-1]  # [b, length - 1, vocabulary]
    losses = cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weight[:, 1:].flatten()
    loss = (losses * weight).sum() / weight.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return float(loss.detach())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, line: Tensor) -> float:
    """Mean next-token loss over windows of 256, in nats."""
    model.train(False)
    batches = line[: len(line) // TOKENS_PER_STEP * TOKENS_PER_STEP].view(-1, 4, 256)  # [n, 4, 256]
    losses = [float(model(input_ids=ids, labels=ids).loss) for ids in batches]
    return sum(losses) / len(losses)


def save_weights(model: LlamaForCausalLM, out: Path) -> None:
    """Write the weights in float16, half the size; `config.json` has them opened in float32."""
    weights = {name: p.detach().half().contiguous() for name, p in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)


def save_setting(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write everything of the folder but the weights and the card."""
    out.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for path in out.iterdir():
        path.chmod(0o644)


def make(out: Path, recipe: Recipe) -> None:
    """The whole recipe: tokenizer, text, model, training, folder, card."""
    begun = time.monotonic()
    torch.set_num_threads(recipe.threads)
    tokenizer, cut = train_tokenizer(recipe.seed), HELD_OUT * TOKENS_PER_STEP
    line, weight = token_line(tokenizer, recipe.steps * TOKENS_PER_STEP + cut, recipe.seed)
    print(f"{len(tokenizer)} tokens in the vocabulary, {len(line)} tokens of text, {time.monotonic() - begun:.0f} s")
    model = new_model(tokenizer, recipe.seed)
    save_setting(model, tokenizer, out)
    train(model, line, weight, recipe, out)
    save_weights(model, out)
    loss = held_out_loss(LlamaForCausalLM.from_pretrained(out), line[-cut:])
    digest = hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
    minutes = (time.monotonic() - begun) / 60
    print(f"held-out loss {loss:.4f} nats per token, {minutes:.1f} minutes, weights sha256 {digest}")
    numbers = {"parameters": model.num_parameters(), "vocabulary": len(tokenizer), "tokens": len(line) - cut}
    write_card(
        out,
        f"SHA-256 of `model.safetensors`: `{digest}`.",
        **asdict(recipe),
        **numbers,
        held_out=cut,
        loss=loss,
        minutes=minutes,
    )


def main() -> None:
    """Read the command line and make the folder."""
    parser = argparse.ArgumentParser(description="Pretrain tiny-base on the text of tinyworld.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=Recipe().steps, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=Recipe().seed, help="seed (default: %(default)s)")
    arguments = parser.parse_args()
    make(arguments.out, Recipe(steps=arguments.steps, seed=arguments.seed))


if __name__ == "__main__":
    main()
