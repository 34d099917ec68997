"""One round of clients: what trains, what is frozen, what leaves, what a failure does, where randomness comes from."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedalt.data.batches import plan_round
from fedalt.data.encode import Example
from fedalt.data.federation import Row
from fedalt.federation.client import ClientResult, client_round
from fedalt.methods.base import Message
from fedalt.model.adapted import AdaptedModel
from fedalt.model.state import ClientState, initial_state
from fedalt.names import INDIVIDUAL, MIXER, REST_OF_WORLD, A, B, G, Key, Tensors
from support import (
    RANK,
    VOCAB,
    bitwise,
    distance,
    examples,
    llama,
    method_of,
    plans_of,
    random_states,
    round_settings,
    run_all,
    run_rounds,
    shape_of,
    start_states,
    training,
)

ROWS = {client: examples(count, seed=client) for client, count in enumerate((7, 10, 3))}
HARD = training(weight_decay=0.5)
STILL = training(lr=1e-30, weight_decay=0, schedule="constant")
METHOD = method_of("fedalt")


@pytest.fixture(scope="module")
def model() -> AdaptedModel:
    return AdaptedModel(llama())


def messages(states: list[ClientState]) -> list[Message]:
    """A mean of ones, of which client 2 is no part."""
    ones = {key: torch.ones_like(value) for key, value in METHOD.upload(states[0]).items()}
    return [Message(ones, 0.0 if state.client == 2 else 1 / 3) for state in states]


def prepared(model: AdaptedModel) -> list[ClientState]:
    """States in which nothing is zero and whose individuals the server has."""
    return [METHOD.uploaded(state) for state in random_states(shape_of(METHOD, model.layer_sizes))]


def one_round(
    model: AdaptedModel, states: list[ClientState], config: Any = HARD, told: Any = None, **options: Any
) -> list[ClientResult]:
    settings = round_settings(METHOD, config, dropout=0.2)
    plans = [plan for plan in plans_of(ROWS, config) if plan.client in {state.client for state in states}]
    return run_all(model, states, told or [None] * len(states), plans, settings, 1, **options)


def part(tensors: Tensors, *slots: str) -> dict[Any, torch.Tensor]:
    return {key: value for key, value in tensors.items() if key.slot in slots}


def digest(tensors: Tensors) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for _, value in sorted(tensors.items()))).hexdigest()


def test_training_moves_individual_and_mixer_and_nothing_else(model: AdaptedModel) -> None:
    states, weights = prepared(model), {k: v.clone() for k, v in model.base.state_dict().items()}
    told = messages(states)
    for state, message, result in zip(states, told, one_round(model, states, told=told), strict=True):
        installed, after = METHOD.receive(state, message).tensors, result.state.tensors
        assert bitwise(part(after, REST_OF_WORLD), part(installed, REST_OF_WORLD))
        assert not any(torch.equal(after[key], installed[key]) for key in part(after, INDIVIDUAL, MIXER))
        assert result.state.round == 1
    base = {name: value for name, value in model.base.state_dict().items() if name in weights and "base_layer" in name}
    assert base
    assert all(torch.equal(value, weights[name]) for name, value in base.items())


def test_all_base_weights_stay_bit_for_bit() -> None:
    plain = llama()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    run_rounds(AdaptedModel(plain), METHOD, ROWS, HARD)
    after = {name.replace(".base_layer", ""): value for name, value in plain.state_dict().items()}
    assert before.keys() <= after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_optimiser_holds_exactly_what_trains(model: AdaptedModel) -> None:
    one_round(model, prepared(model))
    expected = {(path, *rest) for path in model.layers for rest in ((INDIVIDUAL, A), (INDIVIDUAL, B), (MIXER, G))}
    assert model.trainable.keys() == expected
    learning = {id(p) for p in model.base.parameters() if p.requires_grad}
    assert learning == {id(p) for p in model.trainable.values()}


def test_states_that_go_in_are_not_changed(model: AdaptedModel) -> None:
    states = prepared(model)
    before = [digest(state.tensors) for state in states]
    one_round(model, states)
    assert [digest(state.tensors) for state in states] == before


def test_individual_and_mixer_continue_where_the_last_round_ended(model: AdaptedModel) -> None:
    """With a vanishing learning rate the round ends with what it started from, which must not come from the server."""
    end = [result.state for result in one_round(model, prepared(model))]
    told = messages(end)
    for state, message, result in zip(end, told, one_round(model, end, STILL, told), strict=True):
        for tensors in (METHOD.receive(state, message).tensors, result.state.tensors):
            assert digest(part(tensors, INDIVIDUAL, MIXER)) == digest(part(state.tensors, INDIVIDUAL, MIXER))
            assert digest(part(tensors, REST_OF_WORLD)) != digest(part(state.tensors, REST_OF_WORLD))


def test_payload_is_the_individual_lora_alone(model: AdaptedModel) -> None:
    for result in one_round(model, prepared(model)):
        assert bitwise(result.upload, part(result.state.tensors, INDIVIDUAL))
        assert result.state.sent is not None
        assert bitwise(result.upload, result.state.sent)
        size = sum(value.numel() * value.element_size() for value in result.upload.values())
        assert size == 4 * sum(RANK * (d_in + d_out) for d_in, d_out in model.layer_sizes.values())


def test_reported_mixer_weight_is_that_of_the_individual(model: AdaptedModel) -> None:
    """In the first block, whose inputs no adapter has touched yet, over the tokens of the last step."""
    block = model.base.model.layers[0]
    for plan, result in zip(plans_of(ROWS, STILL), one_round(model, prepared(model), STILL), strict=True):
        tokens = torch.tensor([token for row in plan.steps[-1] for token in row.prompt + row.answer])
        x = block.input_layernorm(model.base.model.embed_tokens(tokens))
        for path, alpha in zip(list(model.layers)[:2], result.stats.alpha, strict=False):
            weights = torch.softmax(x @ result.state.tensors[Key(path, MIXER, G)].T, -1).mean(0)
            assert alpha == pytest.approx(weights[0].item(), abs=1e-5)
            assert abs(alpha - 0.5) > 1e-3


def test_identical_clients_have_a_row_like_their_individual(model: AdaptedModel) -> None:
    method = method_of("fedalt", 8)
    shape = shape_of(method, model.layer_sizes)
    twin = plan_round(ROWS[1], 0, training(), 5, 1)
    plans = [replace(twin, client=client) for client in range(8)]
    states = start_states(method, shape, range(8))
    results = client_round(
        model, states, [None] * 8, [[plan] for plan in plans], round_settings(method, HARD, 0.2), round_=1
    )
    uploads = [result.upload for result in results]
    mean = {key: torch.stack([u[key] for u in uploads]).mean(0) for key in uploads[0]}
    for result in results:
        after = method.receive(result.state, Message(mean, 1 / 8)).tensors
        row = {key._replace(slot=INDIVIDUAL): value for key, value in part(after, REST_OF_WORLD).items()}
        assert distance(row, part(after, INDIVIDUAL)) < 1e-5
        assert max(float(value.abs().max()) for key, value in row.items() if key.factor == B) > 1e-3


def test_a_federation_of_one_equals_local_bit_for_bit() -> None:
    """Row and mixer are bypassed: no tensor of theirs exists."""
    runs = []
    for name in ("fedalt", "local"):
        rows = {0: ROWS[0]}
        history, _ = run_rounds(AdaptedModel(llama()), method_of(name, 1), rows, HARD, dropout=0.2)
        runs.append([results[0].state.tensors for results in history])
    assert all(bitwise(one, other) for one, other in zip(*runs, strict=True))
    assert {key.slot for key in runs[0][0]} == {INDIVIDUAL}


@pytest.mark.parametrize("slot", [INDIVIDUAL, REST_OF_WORLD, MIXER])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_client_that_is_not_finite_is_set_aside_alone(model: AdaptedModel, slot: str, value: float) -> None:
    states = prepared(model)
    sick = {key: torch.full_like(t, value) for key, t in states[1].tensors.items() if key.slot == slot}
    states[1] = states[1].with_tensors(sick)
    results = one_round(model, states)
    assert results[1].failure
    assert results[1].state is states[1]
    assert results[1].upload == {}
    without = one_round(model, [states[0], states[2]])
    for result, expected in zip((results[0], results[2]), without, strict=True):
        assert result.failure is None
        assert distance(result.state.tensors, expected.state.tensors) < 1e-6
        assert result.stats.loss == pytest.approx(expected.stats.loss, rel=1e-6)


def test_a_client_that_diverges_is_set_aside(model: AdaptedModel) -> None:
    """Numbers that were finite at the start become infinite within the round."""
    states = prepared(model)
    huge = {key: torch.full_like(t, 3e38) for key, t in states[1].tensors.items() if key.slot == INDIVIDUAL}
    states[1] = states[1].with_tensors(huge)
    results = one_round(model, states)
    assert [result.failure is None for result in results] == [True, False, True]
    assert results[1].state is states[1]


def test_an_error_names_the_round_and_the_client(model: AdaptedModel) -> None:
    broken = Example((3, VOCAB + 5), (4,), Row("", ""))  # a token that the model does not have
    settings = round_settings(METHOD, HARD)
    plans = plans_of(ROWS | {1: (broken,)}, HARD)
    with pytest.raises(IndexError) as error:
        run_all(model, prepared(model), [None] * 3, plans, settings, 4, executor="loop")
    assert error.value.__notes__ == ["in round 4, clients [1]"]


def starts(init: Any, model: AdaptedModel) -> list[Tensors]:
    return [state.tensors for state in start_states(METHOD, shape_of(METHOD, model.layer_sizes), range(4), init)]


@pytest.mark.parametrize(
    ("init", "groups"), [("shared", [0, 0, 0, 0]), ("code_like", [0, 1, 1, 1]), ("per_client", [0, 1, 2, 3])]
)
def test_who_starts_from_the_same_values(model: AdaptedModel, init: str, groups: list[int]) -> None:
    tensors = starts(init, model)
    drawn = [key for key in tensors[0] if (key.slot, key.factor) in {(INDIVIDUAL, A), (MIXER, G)}]
    for i, one in enumerate(tensors):
        for j, other in enumerate(tensors):
            assert all(torch.equal(one[key], other[key]) == (groups[i] == groups[j]) for key in drawn)
        assert all(not value.any() for key, value in one.items() if key not in drawn)
    assert bitwise(starts("shared", model)[0], tensors[0]), "client 0 starts alike in every mode"


def test_start_values_are_uniform_within_one_over_the_root_of_the_inputs(model: AdaptedModel) -> None:
    tensors = starts("per_client", model)
    drawn = torch.cat([value.flatten() for mine in tensors for key, value in mine.items() if key.factor == A])
    drawn = drawn[drawn != 0]  # the row's A is zero
    limit = 32**-0.5
    assert 0.98 * limit < float(drawn.abs().max()) <= limit
    assert float(drawn.std()) == pytest.approx(limit / 3**0.5, rel=0.03)
    assert len(drawn.unique()) > 0.99 * len(drawn), "layers and clients must not repeat each other"


def test_zero_mixer_starts_at_equal_weights(model: AdaptedModel) -> None:
    shape = shape_of(METHOD, model.layer_sizes)
    tensors = initial_state(shape, 0, 7, "shared", "zeros", frozen=METHOD.frozen).tensors
    assert not any(value.any() for key, value in tensors.items() if key.slot == MIXER)
    assert all(value.any() for key, value in tensors.items() if (key.slot, key.factor) == (INDIVIDUAL, A))


def test_all_methods_start_from_the_same_lora(model: AdaptedModel) -> None:
    """A paired comparison: only the method may differ between runs of one seed."""
    drawn = []
    for name in ("local", "fedit", "fedalt"):
        method = method_of(name)
        state = start_states(method, shape_of(method, model.layer_sizes), [0])[0]
        trained = {key: value for key, value in state.tensors.items() if method.trains(key) and key.factor == A}
        drawn.append({key.module: value for key, value in trained.items()})
    for other in drawn[1:]:
        assert all(torch.equal(value, drawn[0][path]) for path, value in other.items())


def test_row_order_comes_from_seed_round_and_client_alone() -> None:
    def order(seed: int = 5, round_: int = 1, client: int = 1, repeat: bool = False) -> Any:
        plan = plan_round(ROWS[1], client, training(repeat_order=repeat), seed, round_)
        return [row.prompt for step in plan.steps for row in step]

    assert order() == order()
    assert len({tuple(order(**change)) for change in ({}, {"seed": 6}, {"round_": 2}, {"client": 2})}) == 4
    assert order(round_=1, repeat=True) == order(round_=2, repeat=True)
    first, second = order()[:10], order()[10:]
    assert first != second
    assert sorted(first) == sorted(second) == sorted(row.prompt for row in ROWS[1])


def test_dropout_seed_differs_between_rounds_and_clients_even_when_the_order_repeats() -> None:
    config = training(repeat_order=True)
    keys = {plan_round(ROWS[1], client, config, 5, round_).key for client in (0, 1) for round_ in (1, 2)}
    assert len(keys) == 4


def test_buckets_hold_rows_of_like_length_and_meet_their_like_at_other_clients() -> None:
    rows = {client: examples(150, seed=client, longest=60) for client in (0, 1)}
    config = training(order="bucketed", local_epochs=1)
    plans = {client: plan_round(mine, client, config, 5, 1) for client, mine in rows.items()}
    padding = {}
    for order in ("strict", "bucketed"):
        mine = plan_round(rows[0], 0, training(order=order, local_epochs=1), 5, 1)
        padding[order] = sum(len(s) * max(map(len, s)) - sum(map(len, s)) for s in mine.steps)
    assert padding["bucketed"] < padding["strict"] / 5
    for client, plan in plans.items():
        assert sorted(row.prompt for step in plan.steps for row in step) == sorted(row.prompt for row in rows[client])
        assert max(map(len, plan.steps)) == config.batch_size
    longest = [[max(map(len, step)) for step in plan.steps] for plan in plans.values()]
    assert longest[0] != sorted(longest[0]), "short batches do not come first"
    differences = [abs(one - other) for one, other in zip(*longest, strict=True)]
    assert sum(differences) / len(differences) < 6
    assert plan_round(rows[0], 0, config, 5, 1) == plans[0]
    assert plan_round(rows[0], 0, config, 5, 2) != plans[0]


def test_bucketed_rows_stay_within_their_window() -> None:
    """Rows of the first 16 batches of the shuffled order are still those of the first 16 batches."""
    rows = examples(150, seed=1, longest=60)
    strict, bucketed = (
        plan_round(rows, 0, training(order=order, local_epochs=1), 5, 1) for order in ("strict", "bucketed")
    )
    first = [{row.prompt for step in plan.steps[:16] for row in step} for plan in (strict, bucketed)]
    assert first[0] == first[1]


@pytest.mark.parametrize("options", [{}, {"executor": "loop"}, {"cohort": 2}])
def test_order_of_clients_changes_nothing(options: dict[str, Any]) -> None:
    backwards = dict(reversed(ROWS.items()))
    expected, server = run_rounds(AdaptedModel(llama()), METHOD, ROWS, HARD, dropout=0.2)
    actual, other = run_rounds(AdaptedModel(llama()), METHOD, backwards, HARD, dropout=0.2, **options)
    for one, reverse in zip(expected, actual, strict=True):
        for result, same in zip(one, reversed(reverse), strict=True):
            assert result.state.client == same.state.client
            assert distance(result.state.tensors, same.state.tensors) < 5e-5
    assert distance(server.mean(), other.mean()) < 5e-5


def test_a_client_gets_the_same_result_alone(model: AdaptedModel) -> None:
    states = prepared(model)
    everybody = one_round(model, states)
    for state, expected in zip(states, everybody, strict=True):
        (alone,) = one_round(model, [state])
        assert distance(alone.state.tensors, expected.state.tensors) < 5e-5
