"""Weights by likeness against plain Hugging Face models, and what answers with them are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from fedalt.config import EvaluationConfig
from fedalt.data.encode import Prompt
from fedalt.evaluation.generate import answer_all
from fedalt.evaluation.prompt_similarity import anchors, embeddings, instance_weights, load_to_answer
from fedalt.methods.base import Method
from fedalt.model.adapted import AdaptedModel
from fedalt.model.batch_layout import BatchLayout
from fedalt.model.layer import Mixing, Placement
from fedalt.model.state import ClientState
from fedalt.names import ANCHOR, GLOBAL, LOCAL, E, Key
from oracle.reference import merged
from support import HIDDEN, SCALE, bitwise, examples, llama, method_of, random_states, shape_of, tokenizer

ROWS = {k: examples(count, seed=60 + k) for k, count in enumerate((4, 7, 2))}
PROMPTS: list[list[Prompt]] = [
    [row.prompt for row in examples(count, seed=70 + k, longest=12)] for k, count in enumerate((3, 20, 1))
]
"""Client 1 has more prompts than are read at a time."""
ANCHORED = Key("", ANCHOR, E)


@cache
def model() -> AdaptedModel:
    return AdaptedModel(llama())


def method_and_placement(**settings: Any) -> tuple[Method, Placement]:
    method = method_of("feddpa_t", **{f"feddpa__{name}": value for name, value in settings.items()})
    return method, Placement(*method.inference, SCALE, 0.0)


def personal(chosen: Sequence[int] = (0, 1, 2), **settings: Any) -> tuple[list[ClientState], Placement]:
    """Clients with anchors from two of their rows."""
    method, placement = method_and_placement(**({"samples": 2, "most": 0.8} | settings))
    states = random_states(shape_of(method, model().layer_sizes), chosen)
    return method.personalise(model(), states, ROWS, placement), placement


def literal_embedding(tensors: Mapping[Key, Tensor], slot: str | None, prompt: Prompt) -> Tensor:
    """The final state of a prompt's last token, from an ordinary model with merged weights, as a unit vector."""
    plain = llama() if slot is None else merged(llama(), tensors, slot, SCALE)
    with torch.no_grad():
        state = plain.model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]
    return state / state.norm()


@pytest.mark.parametrize(("embed_with", "slot"), [("local", LOCAL), ("global", GLOBAL), ("base", None)])
def test_embeddings_are_those_of_plain_models(embed_with: str, slot: str | None) -> None:
    states, placement = personal(embed_with=embed_with)
    for state, units, prompts in zip(states, embeddings(model(), states, PROMPTS, placement), PROMPTS, strict=True):
        assert units.shape == (len(prompts), HIDDEN)
        for i in (0, len(prompts) - 1):
            expected = literal_embedding(state.tensors, slot, prompts[i])
            torch.testing.assert_close(units[i], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("target", ["local", "global"])
def test_weights_are_the_clamped_mean_cosine(target: str) -> None:
    """c = clamp(λ/S Σ_j cos(e(q), e(x_j)), 0, 1), with x_j the rows that the anchor was made of."""
    method, placement = method_and_placement(samples=99, most=0.8, weight_target=target)
    states = random_states(shape_of(method, model().layer_sizes))
    chosen = method.personalise(model(), states, ROWS, placement)
    for state, weights, prompts in zip(
        chosen, instance_weights(model(), chosen, PROMPTS, placement), PROMPTS, strict=True
    ):
        mine = [literal_embedding(state.tensors, LOCAL, row.prompt) for row in ROWS[state.client]]
        for i in (0, len(prompts) - 1):
            likeness = [float(literal_embedding(state.tensors, LOCAL, prompts[i]) @ unit) for unit in mine]
            c = min(max(0.8 * sum(likeness) / len(mine), 0.0), 1.0)
            local, other = weights[i].tolist()
            assert (local if target == "local" else other) == pytest.approx(c, abs=2e-5)
            assert local + other == pytest.approx(1, abs=1e-6)


def test_an_anchor_is_made_of_as_many_rows_as_asked_for_always_the_same() -> None:
    """Two rows of seven: their mean is one of 21."""
    (state,), placement = personal([1])
    (again, *_), _ = personal([1])
    assert torch.equal(state.tensors[ANCHORED], again.tensors[ANCHORED])
    units = [literal_embedding(state.tensors, LOCAL, row.prompt) for row in ROWS[1]]
    pairs = [(units[i] + units[j]) / 2 for i in range(7) for j in range(i)]
    near = [float((state.tensors[ANCHORED][0] - pair).abs().max()) < 2e-5 for pair in pairs]
    assert sum(near) == 1
    whole = torch.stack(units).mean(0)
    (found,) = anchors(model(), [state], [[row.prompt for row in ROWS[1]]], placement)
    torch.testing.assert_close(found[0], whole, rtol=0, atol=2e-5)


def test_a_prompt_that_equals_all_rows_gets_the_largest_weight() -> None:
    method, placement = method_and_placement(most=0.7)
    states = random_states(shape_of(method, model().layer_sizes), [0])
    row = ROWS[0][0]
    chosen = method.personalise(model(), states, {0: [row] * 4}, placement)
    (weights,) = instance_weights(model(), chosen, [[row.prompt]], placement)
    torch.testing.assert_close(weights, torch.tensor([[0.7, 0.3]]), rtol=0, atol=1e-6)


def test_without_a_largest_weight_the_other_slot_answers_alone() -> None:
    states, placement = personal(most=0.0)
    for weights in instance_weights(model(), states, PROMPTS, placement):
        assert torch.equal(weights, torch.tensor([[0.0, 1.0]]).expand(len(weights), 2))


def test_an_anchor_of_length_zero_has_no_likeness() -> None:
    """No direction, no cosine: the global LoRA answers."""
    (state, *_), placement = personal([0])
    state = state.with_tensors({ANCHORED: torch.zeros(1, HIDDEN)})
    (weights,) = instance_weights(model(), [state], PROMPTS[:1], placement)
    assert weights.tolist() == [[0.0, 1.0]] * 3


def test_a_state_of_length_zero_has_no_direction_and_no_nan() -> None:
    """The last norm's weight is 0, so every final state is."""
    base = llama()
    torch.nn.init.zeros_(base.model.norm.weight)
    silent = AdaptedModel(base, packing=False)
    method, placement = method_and_placement()
    states = random_states(shape_of(method, silent.layer_sizes), [0])
    chosen = method.personalise(silent, states, ROWS, placement)
    assert not chosen[0].tensors[ANCHORED].any()
    (weights,) = instance_weights(silent, chosen, PROMPTS[:1], placement)
    assert weights.tolist() == [[0.0, 1.0]] * 3


def test_weights_do_not_depend_on_who_or_what_else_is_there() -> None:
    states, placement = personal()
    together = instance_weights(model(), states, PROMPTS, placement)
    for k, state in enumerate(states):
        (alone,) = personal([state.client])[0]
        torch.testing.assert_close(alone.tensors[ANCHORED], state.tensors[ANCHORED], rtol=0, atol=1e-6)
        assert bitwise(
            {key: value for key, value in alone.tensors.items() if key != ANCHORED},
            {key: value for key, value in state.tensors.items() if key != ANCHORED},
        )
        (mine,) = instance_weights(model(), [alone], [PROMPTS[k]], placement)
        torch.testing.assert_close(mine, together[k], rtol=0, atol=1e-5)
        for i in (0, len(PROMPTS[k]) - 1):
            (one,) = instance_weights(model(), [alone], [[PROMPTS[k][i]]], placement)
            torch.testing.assert_close(one[0], together[k][i], rtol=0, atol=1e-5)
        (backwards,) = instance_weights(model(), [alone], [PROMPTS[k][::-1]], placement)
        torch.testing.assert_close(backwards.flip(0), together[k], rtol=0, atol=1e-5)
    assert float(together[1][:, 0].std()) > 1e-2, "or there would be nothing to mix up"


# ---------------------------------------------------------------------------------------------- what is done with them


def chosen_weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    c = [torch.rand(len(prompts), generator=generator) for prompts in PROMPTS]
    return [torch.stack([each, 1 - each], 1) for each in c]


def fixed(placement: Placement, weights: Tensor) -> Placement:
    return replace(placement, mixing=Mixing("fixed", tuple(weights.tolist())))


@pytest.mark.parametrize("packed", [True, False])
def test_every_row_of_a_batch_has_its_own_weights(packed: bool) -> None:
    states, placement = personal()
    weights = chosen_weights()
    flat = [prompt for mine in PROMPTS for prompt in mine]
    model().load(states, placement)
    rows = BatchLayout(tuple(map(len, PROMPTS)), tuple(map(len, flat)), weights=torch.cat(weights))
    ids = torch.tensor([token for prompt in flat for token in prompt])
    with torch.no_grad():
        found = model().hidden(ids, rows, packed=packed).last_hidden_state.split(list(map(len, flat)))
    at = 0
    for state, prompts, mine in zip(states, PROMPTS, weights, strict=True):
        for prompt, each in list(zip(prompts, mine, strict=True))[:3]:
            model().load([state], fixed(placement, each))
            with torch.no_grad():
                alone = model().hidden(torch.tensor(prompt), BatchLayout((1,), (len(prompt),)), packed=packed)
            torch.testing.assert_close(found[at], alone.last_hidden_state, rtol=0, atol=2e-5)
            at += 1
        at += max(len(prompts) - 3, 0)


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_keep_the_weights_of_their_prompts(beams: int) -> None:
    """Three prompts at a time of each client, some of which end early, one beam or three."""
    tok = tokenizer(eos=7)
    states, placement = personal()
    prompts = [mine[:4] for mine in PROMPTS]
    weights = [each[:4] for each in chosen_weights()]
    config = EvaluationConfig(max_new_tokens=5, num_beams=beams, batch_size=3)
    model().load(states, placement)
    together = answer_all(model(), tok, prompts, config, weights)
    swapped = answer_all(model(), tok, prompts, config, [each.flip(1) for each in weights])
    alone = []
    for state, mine, its in zip(states, prompts, weights, strict=True):
        alone.append([])
        for prompt, each in zip(mine, its, strict=True):
            model().load([state], fixed(placement, each))
            alone[-1] += answer_all(model(), tok, [[prompt]], config)[0]
    assert together == alone
    assert swapped != alone, "weights matter"


def test_weights_are_found_before_answering() -> None:
    """The official code sets them after it has generated."""
    states, placement = personal()
    weights = load_to_answer(model(), states, PROMPTS, placement)
    assert weights is not None
    assert model().clients == 3
    expected = instance_weights(model(), states, PROMPTS, placement)
    assert all(torch.equal(one, other) for one, other in zip(weights, expected, strict=True))
    plain = replace(placement, mixing=Mixing("fixed", (0.5, 0.5)))
    assert load_to_answer(model(), states, PROMPTS, plain) is None
