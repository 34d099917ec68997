"""Our greedy and beam search give the tokens that `generate` gives, whoever has finished."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedalt.config import EvaluationConfig
from fedalt.data.batches import pad_prompts
from fedalt.data.encode import Prompt
from fedalt.evaluation import decode
from fedalt.evaluation.generate import answer
from fedalt.model.adapted import AdaptedModel
from support import MODELS, PAD, example, opt, tokenizer

LONGEST = 12
PROMPTS: list[Prompt] = [example(3 + i % 7, 1, 50 + i).prompt for i in range(14)]


def theirs(base: Any, prompts: list[Prompt], beams: int, ends: list[int], **options: Any) -> list[str]:
    tok = tokenizer()
    out = []
    for start in range(0, len(prompts), 2):  # two rows at a time, as the paper's code does
        ids, mask = pad_prompts(prompts[start : start + 2], PAD)
        tokens = base.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=LONGEST,
            num_beams=beams,
            do_sample=False,
            pad_token_id=PAD,
            eos_token_id=ends,
            **options,
        )
        out += tok.batch_decode(tokens[:, ids.shape[1] :], skip_special_tokens=False)
    return out


def ours(base: Any, prompts: list[Prompt], beams: int, ends: list[int]) -> list[str]:
    config = EvaluationConfig(max_new_tokens=LONGEST, num_beams=beams)
    model = AdaptedModel(base)
    return answer(model, _Ends(tokenizer(), ends), prompts, [0] * len(prompts), config)


class _Ends:
    """The tests' tokenizer with several end-of-sequence tokens, special tokens kept so that all tokens are compared."""

    def __init__(self, tok: Any, ends: list[int]) -> None:
        self.tok, self.eos_token_id, self.pad_token_id = tok, ends, PAD

    def batch_decode(self, tokens: Any, skip_special_tokens: bool) -> list[str]:
        return list(self.tok.batch_decode(tokens, skip_special_tokens=False))


def trimmed(texts: list[str], ends: list[int]) -> list[list[str]]:
    """Tokens up to and with the first end of sequence; what `generate` pads with comes after it."""
    pad, stops = tokenizer().decode([PAD]), [tokenizer().decode([end]) for end in ends]
    out = []
    for text in texts:
        words = text.replace(pad, f" {pad} ").split()
        at = min((words.index(stop) for stop in stops if stop in words), default=len(words))
        out.append(words[: at + 1])
    return out


ALL = {**MODELS, "opt": opt}


@cache
def by_frequency(name: str) -> list[int]:
    """Tokens that the model says, those that it likes best first."""
    words = [w for text in theirs(ALL[name](), PROMPTS, 1, [2]) for w in text.split()]
    ids = [int(w[1:]) for w in words if w[1:].isdigit()]
    return sorted(set(ids), key=lambda token: -ids.count(token))


def frequent(name: str, count: int) -> list[int]:
    """Tokens that the model likes to say, so that answers end at many different lengths."""
    return by_frequency(name)[:count]


@pytest.mark.parametrize("beams", [1, 2, 4])
@pytest.mark.parametrize("ends", [0, 1, 3])
@pytest.mark.parametrize("name", ALL)
def test_answers_are_those_of_generate(name: str, ends: int, beams: int) -> None:
    make = ALL[name]
    stops = frequent(name, ends) or [2]
    expected = trimmed(theirs(make(), PROMPTS, beams, stops), stops)
    assert trimmed(ours(make(), PROMPTS, beams, stops), stops) == expected
    if ends and beams == 1:
        assert len({len(words) for words in expected}) > 1, "some answers must end before others"


Reads = list[tuple[int, int]]
"""Rows and tokens a row of every forward pass."""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    seen: Reads = []
    read = decode.Batch._read

    def counting(self: decode.Batch, tokens: Tensor, *rest: Any, **options: Any) -> Tensor:
        seen.append((tokens.shape[0], tokens.shape[1]))
        return read(self, tokens, *rest, **options)

    monkeypatch.setattr(decode.Batch, "_read", counting)
    return seen


@pytest.mark.parametrize(("beams", "branched"), [(1, False), (4, True), (4, False)])
def test_finished_rows_leave_the_batch(
    beams: int, branched: bool, reads: Reads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdaptedModel, "branches", lambda model, slots: branched)
    ours(MODELS["llama"](), PROMPTS, beams, frequent("llama", 6 if beams > 1 else 3))
    each = 1 if branched else beams  # rows a prompt
    (first, *rows), widths = [r for r, _ in reads], {width for _, width in reads[1:]}
    assert first == len(PROMPTS), "prompts are read once, not once per beam"
    assert widths == {beams if branched else 1}
    assert rows == sorted(rows, reverse=True)
    assert rows[0] > 0.7 * len(PROMPTS) * each
    assert rows[-1] < 0.5 * len(PROMPTS) * each


def test_beams_in_rows_of_their_own_give_the_same_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    stops = frequent("llama", 3)
    branched = ours(MODELS["llama"](), PROMPTS, 4, stops)
    monkeypatch.setattr(AdaptedModel, "branches", lambda model, slots: False)
    assert ours(MODELS["llama"](), PROMPTS, 4, stops) == branched


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("name", ALL)
def test_prompts_read_in_parts_give_the_same_answers(name: str, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make = ALL[name]
    whole = ours(make(), PROMPTS, beams, [2])
    for tokens in (1, 20):
        monkeypatch.setattr(decode, "_TOKENS", tokens)
        assert ours(make(), PROMPTS, beams, [2]) == whole


@given(st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(1, 100))
def test_parts_hold_every_row_once_longest_first_and_fit(lengths: list[int], tokens: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_TOKENS", tokens)
        parts = list(decode._alike(lengths))
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    for part in parts:
        assert part == sorted(part), "clients' rows must stay in blocks"
        assert len(part) == 1 or len(part) * max(lengths[row] for row in part) <= tokens
    for one, other in pairwise(parts):
        assert min(lengths[row] for row in one) >= max(lengths[row] for row in other)


def test_settings_of_the_model_are_respected() -> None:
    """A repetition penalty in the model's own generation settings changes greedy answers; `generate` answers then."""
    plain, strict = MODELS["llama"](), MODELS["llama"]()
    strict.generation_config.repetition_penalty = 5.0
    expected = [text for prompt in PROMPTS for text in theirs(strict, [prompt], 1, [2])]  # without padding
    assert expected != theirs(plain, PROMPTS, 1, [2])
    assert trimmed(ours(strict, PROMPTS, 1, [2]), [2]) == trimmed(expected, [2])


@pytest.mark.parametrize("early", [True, "never"])
def test_rules_for_stopping_that_are_not_ours_are_left_to_generate(early: Any) -> None:
    base = MODELS["llama"]()
    base.generation_config.early_stopping = early
    stops = frequent("llama", 3)
    expected = theirs(MODELS["llama"](), PROMPTS, 4, stops, early_stopping=early)
    assert trimmed(ours(base, PROMPTS, 4, stops), stops) == trimmed(expected, stops)
