"""Likelihoods of options are those of a literal loop over rows, options and tokens on plain models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fedalt.config import EvaluationConfig
from fedalt.data.encode import Example
from fedalt.data.federation import Row
from fedalt.evaluation.choices import choose, option_scores, options_of
from fedalt.model.adapted import AdaptedModel
from fedalt.model.layer import SUM, Mixing, Placement
from fedalt.model.state import ClientState
from fedalt.training import loss
from oracle.reference import PlainClient
from support import (
    MODELS,
    SCALE,
    VOCAB,
    example,
    gpt2,
    llama,
    method_of,
    placement,
    random_states,
    shape_of,
    tokenizer,
)

LISTS = [["t9 t25", "t9", "t26 t27 t28"], ["t20", "t21"], [], ["t30", "t31", "t32 t33", "t30 t34"], ["t40 t41"]]
"""Options of a client's rows, by turns: one is a prefix of others; none; four; a single one."""


def row(choices: Sequence[str], prompt: int, seed: int) -> Example:
    drawn = example(prompt, 2, seed)
    text = "\n".join(["what?", "", "OPTIONS:", *(f"- {c}" for c in choices)]) if choices else "what?"
    return Example(drawn.prompt, drawn.answer, Row(text, "t3"))


ROWS = [[row(LISTS[(k + i) % 5], 3 + (2 * i + k) % 7, 10 * k + i) for i in range(n)] for k, n in enumerate((5, 0, 7))]


def config(batch: int = 4) -> EvaluationConfig:
    return EvaluationConfig(batch_size=batch)


def with_clients(name: str, method: str) -> tuple[AdaptedModel, list[ClientState]]:
    model = AdaptedModel(MODELS[name]())
    shape = shape_of(method_of(method), model.layer_sizes)
    states = random_states(shape, (0, 1, 2))
    model.load(states, placement(shape))
    return model, states


def literal(model: Any, asked: Example, option: str, tok: Any) -> tuple[float, int]:
    """The sum over tokens, one forward pass for each."""
    total, ids = 0.0, list(asked.prompt)
    for token in [*tok(option)["input_ids"], tok.eos_token_id]:
        total += float(torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].double(), -1)[token])
        ids.append(token)
    return total, len(ids) - len(asked.prompt)


@pytest.mark.parametrize("method", ["local", "fedalt"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_scores_equal_a_literal_loop_on_each_clients_plain_model(name: str, method: str) -> None:
    model, states = with_clients(name, method)
    tok = tokenizer()
    sums, means = (option_scores(model, tok, ROWS, config(), normalise=how) for how in (False, True))
    chosen = choose(option_scores(model, tok, ROWS, config()))
    for k, state in enumerate(states):
        plain = PlainClient(MODELS[name](), state.tensors, SCALE).model
        for i, asked in enumerate(ROWS[k]):
            expected = {o: literal(plain, asked, o, tok) for o in options_of(asked.row.instruction)}
            assert sums[k][i] == pytest.approx({o: total for o, (total, _) in expected.items()}, abs=2e-4)
            assert means[k][i] == pytest.approx({o: total / n for o, (total, n) in expected.items()}, abs=2e-4)
            best = max(expected, key=lambda o: expected[o][0]) if expected else None
            assert chosen[k][i] == best


def test_clients_read_the_same_rows_differently_and_batches_change_nothing() -> None:
    model, _ = with_clients("llama", "fedalt")
    tok, mine = tokenizer(), ROWS[0]
    scores = option_scores(model, tok, [mine] * 3, config(1))
    assert scores[0] != scores[1] != scores[2]
    for one, other in zip(scores, option_scores(model, tok, [mine] * 3, config(100)), strict=True):
        for a, b in zip(one, other, strict=True):
            assert a == pytest.approx(b, abs=1e-4)


def test_padded_rows_have_the_same_scores() -> None:
    model, states = with_clients("llama", "fedalt")
    padded = AdaptedModel(llama(), packing=False)
    padded.load(states, placement(shape_of(method_of("fedalt"), model.layer_sizes)))
    assert model.packs and not padded.packs
    both = [option_scores(one, tokenizer(), ROWS, config()) for one in (model, padded)]
    for mine, theirs in zip(*both, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a == pytest.approx(b, abs=1e-4)


def test_few_logits_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = with_clients("bloom", "local")
    whole = option_scores(model, tokenizer(), ROWS, config())
    monkeypatch.setattr(loss, "_LOGITS", {"cpu": 2 * VOCAB})
    monkeypatch.setattr(loss, "_TOKENS", 1)
    for one, other in zip(whole, option_scores(model, tokenizer(), ROWS, config()), strict=True):
        for a, b in zip(one, other, strict=True):
            assert a == pytest.approx(b, abs=1e-5)


@torch.no_grad()
def test_an_option_is_not_likelier_for_being_the_beginning_of_another() -> None:
    """Where the model would rather go on than end, the longer option wins; without the end it never could."""
    model, prompt = AdaptedModel(llama()), example(4, 1, 1).prompt
    after = model.base(input_ids=torch.tensor([[*prompt, 9]])).logits[0, -1]
    tok, likely = tokenizer(int(after.argmin())), int(after.argmax())
    asked = Example(prompt, (3,), Row(f"OPTIONS:\n- t9\n- t9 t{likely}", ""))
    scores = option_scores(model, tok, [[asked]], config())[0][0]
    assert list(scores) == ["t9", f"t9 t{likely}"]
    assert scores["t9"] < scores[f"t9 t{likely}"]
    assert choose(option_scores(model, tok, [[asked]], config())) == [[f"t9 t{likely}"]]


def test_the_first_of_equal_options_is_chosen_and_others_by_tokens_not_text() -> None:
    """Words that the tokenizer does not know all become the same token."""
    model = AdaptedModel(llama())
    tok, asked = tokenizer(), row(["unknown", "also unknown", "other"], 5, 2)
    scores = option_scores(model, tok, [[asked]], config(1))[0][0]
    assert scores["unknown"] == scores["other"] != scores["also unknown"]
    swapped = row(["other", "unknown"], 5, 2)
    assert choose(option_scores(model, tok, [[swapped]], config())) == [["other"]]


def test_rows_without_options_cost_no_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AdaptedModel(llama())
    monkeypatch.setattr(model, "hidden", lambda *args, **kwargs: pytest.fail("nothing is asked"))
    assert choose(option_scores(model, tokenizer(), [[row([], 3, 1)] * 2, []], config())) == [[None, None], []]


def test_options_beyond_the_models_positions_are_left_to_generation() -> None:
    model = AdaptedModel(gpt2())  # 64 positions
    rows = [row(["t9", "t20"], 62, 1), row(["t9", "t20"], 63, 2)]
    ((fits, does_not),) = choose(option_scores(model, tokenizer(), [rows], config()))
    assert fits in ("t9", "t20") and does_not is None


def test_weights_by_instance_reach_their_row() -> None:
    """Weights of (1, 0) and (0, 1) are the two slots alone, whichever row of the batch they belong to."""
    model = AdaptedModel(llama())
    shape = shape_of(method_of("fedalt"), model.layer_sizes)
    states, mine = random_states(shape, (0,)), [ROWS[0][0], ROWS[0][3], ROWS[0][1]]
    tok, found = tokenizer(), []
    for slots in (shape.slots, *((slot,) for slot in shape.slots)):
        mixing = Mixing("instance", target=slots[0]) if len(slots) == 2 else SUM
        model.load(states, Placement(slots, mixing, SCALE, 0.0))
        weights = [torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])] if len(slots) == 2 else None
        found.append(option_scores(model, tok, [mine], config(3), weights=weights)[0])
    mixed, first, second = found
    for i, expected in enumerate((first[0], second[1], first[2])):
        assert mixed[i] == pytest.approx(expected, abs=1e-4)
    assert first[0] != pytest.approx(second[0], abs=1e-2)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("Is it?\n\nOPTIONS:\n- yes\n- it is not possible to tell\n- no", ("yes", "it is not possible to tell", "no")),
        ("OPTIONS:\r\n - a - b \r\n- c\r\n\r\nWhich?", ("a - b", "c")),
        ("OPTIONS:\n- quoted\n\nOPTIONS:\n- last\n- last\n- one", ("last", "one")),
        ("OPTIONS:\nnone", ()),
        ("The OPTIONS: are\n- many", ()),
        ("- a\n- b", ()),
        ("", ()),
    ],
)
def test_the_list_of_options(instruction: str, expected: tuple[str, ...]) -> None:
    assert options_of(instruction) == expected
