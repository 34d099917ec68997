"""Answers of many clients' models in one batch are those of each alone, and those of plain merged models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fedalt.config import EvaluationConfig
from fedalt.data.encode import Example, Prompt
from fedalt.data.federation import Row
from fedalt.evaluation import decode, generate
from fedalt.evaluation.evaluate import evaluate
from fedalt.evaluation.generate import answer_all, chunks
from fedalt.model.adapted import AdaptedModel
from fedalt.model.base import cache_bytes
from fedalt.model.batch_layout import BatchLayout
from fedalt.model.state import ClientState
from fedalt.names import INDIVIDUAL
from oracle.reference import merged
from support import MODELS, PAD, SCALE, examples, llama, method_of, placement, random_states, shape_of, tokenizer

PROMPTS: list[list[Prompt]] = [
    [row.prompt for row in examples(count, seed=20 + k, longest=12)] for k, count in enumerate((3, 5, 1))
]
TOKENS = 6


def config(beams: int = 1, batch: int = 2) -> EvaluationConfig:
    return EvaluationConfig(max_new_tokens=TOKENS, num_beams=beams, batch_size=batch)


def with_clients(base: Any, method: str, chosen: Sequence[int] = (0, 1, 2)) -> tuple[AdaptedModel, list[ClientState]]:
    model = AdaptedModel(base)
    shape = shape_of(method_of(method), model.layer_sizes)
    states = random_states(shape, chosen)
    model.load(states, placement(shape))
    return model, states


def plain(model: Any, prompt: Prompt, beams: int, tok: Any) -> str:
    """Hugging Face's generate on one prompt without padding."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS,
        num_beams=beams,
        do_sample=False,
        pad_token_id=PAD,
        eos_token_id=tok.eos_token_id,
    )
    return str(tok.decode(out[0, len(prompt) :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_answers_equal_each_client_alone_and_plain_merged_models(name: str, beams: int) -> None:
    """Prompts have many lengths, so the batch is left-padded; the plain model sees none of it."""
    tok = tokenizer()
    model, states = with_clients(MODELS[name](), "local")
    together = answer_all(model, tok, PROMPTS, config(beams))
    for k, state in enumerate(states):
        single, _ = with_clients(MODELS[name](), "local", [k])
        assert answer_all(single, tok, [PROMPTS[k]], config(beams)) == [together[k]]
        merged_model = merged(MODELS[name](), state.tensors, INDIVIDUAL, SCALE)
        assert [plain(merged_model, prompt, beams, tok) for prompt in PROMPTS[k]] == together[k]
        base = MODELS[name]()
        assert [plain(base, prompt, beams, tok) for prompt in PROMPTS[k]] != together[k], "adapters must matter"


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_mixed_adapters_answer_alike_alone_and_together(name: str, beams: int) -> None:
    tok = tokenizer()
    model, _ = with_clients(MODELS[name](), "fedalt")
    together = answer_all(model, tok, PROMPTS, config(beams, batch=8))
    for k in range(3):
        single, _ = with_clients(MODELS[name](), "fedalt", [k])
        one_by_one = [answer_all(single, tok, [[prompt]], config(beams))[0][0] for prompt in PROMPTS[k]]
        assert one_by_one == together[k]


@pytest.mark.parametrize("name", MODELS)
def test_prompts_of_several_clients_are_read_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of like length, in parts: each under its own client's adapters all the same."""
    model, _ = with_clients(MODELS[name](), "fedalt")
    whole = answer_all(model, tokenizer(), PROMPTS, config(batch=8))
    parts: list[tuple[int, ...]] = []
    rows = model.rows

    def watched(rowmap: BatchLayout, *rest: Any) -> Any:
        parts.append(rowmap.sizes)
        return rows(rowmap, *rest)

    monkeypatch.setattr(decode, "_TOKENS", 30)
    monkeypatch.setattr(model, "rows", watched)
    assert answer_all(model, tokenizer(), PROMPTS, config(batch=8)) == whole
    reads = parts[: len(parts) - TOKENS + 1]
    assert len(reads) > 1 and any(sum(size > 0 for size in sizes) > 1 for sizes in reads)


def test_a_batch_of_one_is_one_answer() -> None:
    model, _ = with_clients(llama(), "fedalt", [0])
    answers = answer_all(model, tokenizer(), [[PROMPTS[0][0]]], config())
    assert len(answers) == len(answers[0]) == 1
    assert len(answers[0][0].split()) == TOKENS


def test_a_client_without_prompts_has_no_answers() -> None:
    model, _ = with_clients(llama(), "fedalt")
    full = answer_all(model, tokenizer(), PROMPTS, config())
    assert answer_all(model, tokenizer(), [PROMPTS[0], [], PROMPTS[2]], config()) == [full[0], [], full[2]]
    assert answer_all(model, tokenizer(), [[], [], []], config()) == [[], [], []]


@pytest.mark.parametrize("beams", [1, 4])
def test_an_answer_stops_before_the_end_of_sequence_token(beams: int) -> None:
    """The token that one greedy answer holds in its middle is declared to be the end."""
    model, _ = with_clients(llama(), "fedalt")
    free = answer_all(model, tokenizer(), PROMPTS, config())
    words = [answer.split() for mine in free for answer in mine]
    end = next(w[2] for w in words if w[2] not in w[:2])
    tok = tokenizer(int(end[1:]))
    stopped = answer_all(model, tok, PROMPTS, config(beams))
    assert not any(end in answer.split() for mine in stopped for answer in mine)
    if beams == 1:
        cut = [" ".join(w[: w.index(end)] if end in w else w) for w in words]
        assert [answer for mine in stopped for answer in mine] == cut
        assert len({len(answer.split()) for answer in cut}) > 1, "some answers must go on after others have ended"


def test_chunks_hold_every_prompt_once_and_similar_lengths_together() -> None:
    listed = list(chunks(PROMPTS, 2))
    places = [place for chunk in listed for place in chunk]
    assert sorted(places) == [(k, i) for k, mine in enumerate(PROMPTS) for i in range(len(mine))]
    assert [[k for k, _ in chunk] for chunk in listed] == [[0, 0, 1, 1, 2], [0, 1, 1], [1]]
    lengths = [len(PROMPTS[k][i]) for k, i in places if k == 1]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(("beams", "branches"), [(1, False), (4, False), (4, True)])
@pytest.mark.parametrize("name", MODELS)
def test_batches_shrink_to_what_fits_into_memory_and_answers_stay(
    name: str, branches: bool, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = with_clients(MODELS[name](), "fedalt")
    if branches and not model.branches(32):
        pytest.skip("beams of this model cannot share a row")
    model.__dict__["_branches"] = branches
    seen: list[int] = []
    own = generate.answer

    def counted(model: Any, tok: Any, prompts: Any, *rest: Any, **more: Any) -> Any:
        seen.append(len(prompts))
        return own(model, tok, prompts, *rest, **more)

    monkeypatch.setattr(generate, "answer", counted)
    free = answer_all(model, tokenizer(), PROMPTS, config(beams, batch=8))
    assert seen == [9]
    longest = max(len(prompt) for mine in PROMPTS for prompt in mine)
    each = longest + beams * TOKENS if branches else beams * (longest + TOKENS)
    bytes_ = 2 * each * cache_bytes(model.base)  # half of what is free may be used
    for most, sizes in ((4, [4, 4, 1]), (1, [1] * 9), (0, [1] * 9)):
        seen.clear()
        monkeypatch.setattr(generate, "free_memory", lambda device, most=most: most * bytes_)
        assert answer_all(model, tokenizer(), PROMPTS, config(beams, batch=8)) == free
        assert seen == sizes


def test_evaluation_scores_every_client_on_its_own_rows() -> None:
    """The reference of client k's rows is what its own model answers, so everybody scores 100, and nobody elsewhere."""
    model, states = with_clients(llama(), "fedalt")
    tok = tokenizer()
    answers = answer_all(model, tok, PROMPTS, config())
    rows = {
        k: [
            Example(p, (3,), Row("", text, category=f"kind {k}"))
            for p, text in zip(PROMPTS[k], answers[k], strict=True)
        ]
        for k in range(3)
    }
    layout = placement(shape_of(method_of("fedalt"), model.layer_sizes))
    results = evaluate(model, tok, states, rows, layout, config=config())
    assert [result.client for result in results] == [0, 1, 2]
    for k, result in enumerate(results):
        assert result.scores["exact_match"] == result.scores["rouge1"] == 100
        assert [line["answer"] for line in result.lines] == answers[k]
        assert list(result.scores["categories"]) == [f"kind {k}"]
    swapped = [ClientState((s.client + 1) % 3, 0, s.tensors) for s in states]
    assert all(r.scores["exact_match"] < 100 for r in evaluate(model, tok, swapped, rows, layout, config=config()))
    assert evaluate(model, tok, [], rows, layout, config=config()) == []
