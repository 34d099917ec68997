"""K clients in one forward and backward = a loop over them = K plain models trained by torch, each alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedalt.config import TrainingConfig
from fedalt.data.batches import Plan, collate
from fedalt.federation.client import ClientResult
from fedalt.model.adapted import AdaptedModel
from fedalt.model.state import ClientState
from fedalt.names import Key
from fedalt.training.loop import train
from fedalt.training.loss import client_losses
from oracle.reference import PlainClient
from support import (
    MODELS,
    PAD,
    SCALE,
    bert,
    bitwise,
    distance,
    example,
    examples,
    gpt2,
    llama,
    method_of,
    opt,
    placement,
    plans_of,
    random_states,
    relative,
    round_settings,
    run_all,
    shape_of,
    training,
)

ALL = {**MODELS, "opt": opt, "bert": bert}
LAYOUTS = pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
SIZES = {0: 7, 1: 10, 2: 3}
"""Rows per client: batches of 4 leave last batches of 3, 2 and 3, and clients stop after 2, 3 and 1 steps an epoch."""
ROWS = {client: examples(count, seed=client, longest=6 + 3 * client) for client, count in SIZES.items()}
GROUPS = [ROWS[0][:3], ROWS[1][:1], ROWS[2][:2]]
CLOSE = 5e-5
"""After up to six AdamW steps of up to 5e-3, of which rounding moves entries with tiny gradients most."""
CLIP = training(max_grad_norm=0.5)


def loaded(
    base: Any, states: list[ClientState] | None = None, method: str = "fedalt", **options: bool
) -> tuple[AdaptedModel, list[ClientState]]:
    """A model with three clients on it whose B and row are random, ready to train."""
    model, rule = AdaptedModel(base, **options), method_of(method)
    shape = shape_of(rule, model.layer_sizes)
    states = states or random_states(shape)
    model.load(states, placement(shape), [key for key in shape.shapes() if rule.trains(key)])
    return model, states


def slices(model: AdaptedModel, client: int) -> dict[Key, Tensor]:
    return {key: value[client].detach().clone() for key, value in model.trainable.items()}


def run(
    model: AdaptedModel,
    states: list[ClientState],
    plans: list[Plan],
    config: TrainingConfig,
    method: str = "fedalt",
    dropout: float = 0.0,
    **executor: Any,
) -> list[ClientResult]:
    rule = method_of(method)
    settings = round_settings(rule, config, dropout)
    return run_all(model, states, [None] * len(states), plans, settings, 1, **executor)


@pytest.mark.parametrize("name", ALL)
@LAYOUTS
def test_gradients_of_one_step_equal_plain_models(name: str, packing: bool) -> None:
    model, states = loaded(ALL[name](), packing=packing)
    losses = client_losses(model, collate(GROUPS))
    losses.sum().backward()
    for k, (state, rows) in enumerate(zip(states, GROUPS, strict=True)):
        alone = PlainClient(ALL[name](), state.tensors, SCALE)
        loss = alone.loss(rows, PAD)
        loss.backward()
        assert losses[k].item() == pytest.approx(loss.item(), rel=1e-5)
        assert alone.parameters.keys() == model.trainable.keys()
        for key, parameter in model.trainable.items():
            assert relative(parameter.grad[k], alone.parameters[key].grad) < 1e-5  # type: ignore[index, arg-type]


def test_gradients_in_double_precision() -> None:
    """GPT-2 only: Llama and Bloom round to fp32 inside."""
    _, single = loaded(gpt2())
    double = [state.with_tensors({k: v.double() for k, v in state.tensors.items()}) for state in single]
    model, states = loaded(gpt2().double(), double)
    client_losses(model, collate(GROUPS)).sum().backward()
    for k, (state, rows) in enumerate(zip(states, GROUPS, strict=True)):
        alone = PlainClient(gpt2().double(), state.tensors, SCALE)
        alone.loss(rows, PAD).backward()
        for key, parameter in model.trainable.items():
            assert relative(parameter.grad[k], alone.parameters[key].grad) < 1e-10  # type: ignore[index, arg-type]


def test_loss_is_each_clients_own_token_mean() -> None:
    """Hugging Face's batch mean would weigh clients by their tokens: 1, 4 and 9 answer tokens here."""
    groups = [(example(5, 1, 0),), (example(4, 4, 1),), (example(3, 6, 2), example(7, 3, 3))]
    model, states = loaded(llama())
    losses = client_losses(model, collate(groups)).detach()
    alone = [PlainClient(llama(), s.tensors, SCALE).loss(rows, PAD) for s, rows in zip(states, groups, strict=True)]
    torch.testing.assert_close(losses, torch.stack(alone).detach(), rtol=1e-5, atol=1e-6)
    token_mean = float((losses * torch.tensor([1.0, 4, 9])).sum()) / 14
    assert abs(float(losses.sum()) / 3 - token_mean) > 1e-2


@pytest.mark.parametrize("name", ALL)
@LAYOUTS
def test_several_steps_equal_plain_models_trained_by_torch(name: str, packing: bool) -> None:
    model, states = loaded(ALL[name](), packing=packing)
    plans = plans_of(ROWS, CLIP)
    results = run(model, states, plans, CLIP)
    free = run(model, states, plans, training(max_grad_norm=1e9))[1]
    assert distance(results[1].state.tensors, free.state.tensors) > 4 * CLOSE, "clipping must matter here"
    for state, plan, result in zip(states, plans, results, strict=True):
        alone = PlainClient(ALL[name](), state.tensors, SCALE)
        losses = alone.train(plan.steps, PAD, CLIP.lr, CLIP.weight_decay, CLIP.max_grad_norm)
        trained = {key: result.state.tensors[key] for key in alone.parameters}  # type: ignore[index]
        expected = {Key(*key): value.detach() for key, value in alone.parameters.items()}
        assert distance(trained, expected) < CLOSE
        assert distance(trained, {key: state.tensors[key] for key in expected}) > 5e-3
        assert result.stats.loss == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        assert (result.stats.steps, result.stats.tokens) == (len(plan.steps), 2 * sum(map(len, ROWS[state.client])))


def test_fedit_equals_plain_models_too() -> None:
    """One slot, no mixer."""
    model, states = loaded(llama(), method="fedit")
    plans = plans_of(ROWS, CLIP)
    for state, plan, result in zip(states, plans, run(model, states, plans, CLIP, "fedit"), strict=True):
        alone = PlainClient(llama(), state.tensors, SCALE)
        alone.train(plan.steps, PAD, CLIP.lr, CLIP.weight_decay, CLIP.max_grad_norm)
        assert distance(result.state.tensors, {Key(*k): v.detach() for k, v in alone.parameters.items()}) < CLOSE


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@LAYOUTS
def test_stacked_equals_loop_and_cohorts(name: str, dropout: float, packing: bool) -> None:
    model, states = loaded(ALL[name](), packing=packing)
    plans = plans_of(ROWS, CLIP)
    loop = run(model, states, plans, CLIP, dropout=dropout, executor="loop")
    for options in ({}, {"cohort": 2}):
        for result, single in zip(run(model, states, plans, CLIP, dropout=dropout, **options), loop, strict=True):
            assert distance(result.state.tensors, single.state.tensors) < CLOSE
            assert result.stats.loss == pytest.approx(single.stats.loss, rel=1e-4)
    if dropout:
        plain = run(model, states, plans, CLIP)
        assert all(distance(a.state.tensors, b.state.tensors) > 1e-3 for a, b in zip(plain, loop, strict=True))


@pytest.mark.parametrize("name", ALL)
@LAYOUTS
def test_reported_mixer_weights_do_not_depend_on_company(name: str, packing: bool) -> None:
    """Prompts of one client are longer than another's, so padding would show."""
    model, states = loaded(ALL[name](), packing=packing)
    plans = plans_of(ROWS, CLIP)
    loop = run(model, states, plans, CLIP, executor="loop")
    for together, alone in zip(run(model, states, plans, CLIP), loop, strict=True):
        assert len(together.stats.alpha) == len(model.layers)
        assert together.stats.alpha == pytest.approx(alone.stats.alpha, abs=1e-4)


def test_clients_that_finish_earlier_stay_bitwise_untouched() -> None:
    config = training(schedule="constant", weight_decay=0.1)
    model, _ = loaded(llama())
    plans, seen = plans_of(ROWS, config), []
    train(model, plans, config, lambda done, total: seen.append([slices(model, k) for k in range(3)]))
    assert [len(plan.steps) for plan in plans] == [4, 6, 2]
    assert len(seen) == 6
    for k, plan in enumerate(plans):
        last = len(plan.steps) - 1
        assert all(bitwise(seen[last][k], later[k]) for later in seen[last:])
        assert all(not bitwise(seen[step][k], seen[step + 1][k]) for step in range(last))


@pytest.mark.parametrize("chosen", [(0, 2), (2, 0, 1), (1,)])
def test_a_client_does_not_notice_its_company(chosen: tuple[int, ...]) -> None:
    model, states = loaded(gpt2())
    plans = plans_of(ROWS, CLIP)
    everybody = run(model, states, plans, CLIP, dropout=0.3)
    some = run(model, [states[k] for k in chosen], [plans[k] for k in chosen], CLIP, dropout=0.3)
    for k, result in zip(chosen, some, strict=True):
        assert result.state.client == k
        assert distance(result.state.tensors, everybody[k].state.tensors) < CLOSE


@pytest.mark.parametrize("name", ALL)
@LAYOUTS
def test_gradient_checkpointing_changes_nothing(name: str, packing: bool) -> None:
    make, plans = ALL[name], plans_of(ROWS, CLIP)
    plain, states = loaded(make(), packing=packing)
    recomputing, _ = loaded(make(), packing=packing, gradient_checkpointing=True)
    pairs = zip(
        run(plain, states, plans, CLIP, dropout=0.3), run(recomputing, states, plans, CLIP, dropout=0.3), strict=True
    )
    for one, other in pairs:
        assert distance(one.state.tensors, other.state.tensors) < 1e-6


@pytest.mark.parametrize("name", MODELS)
@LAYOUTS
def test_recompute_sees_the_row_map_of_its_own_forward(name: str, packing: bool) -> None:
    """Two forwards with other owners, then one backward: without a snapshot both recomputes use the last map."""
    gradients = []
    for options in ({}, {"gradient_checkpointing": True}):
        model, _ = loaded(ALL[name](), packing=packing, **options)
        model.train()
        first = client_losses(model, collate(GROUPS))
        second = client_losses(model, collate([ROWS[0][3:5], ROWS[1][1:5], ()]))
        (first.sum() + second.sum()).backward()
        gradients.append({key: p.grad for key, p in model.trainable.items()})
    assert all(relative(gradients[1][key], gradients[0][key]) < 1e-5 for key in gradients[0])


def test_checkpointing_really_recomputes() -> None:
    calls = []
    for options in ({}, {"gradient_checkpointing": True}):
        model, _ = loaded(llama(), **options)
        layer, count = next(iter(model.layers.values())), []
        layer.register_forward_hook(lambda *_, count=count: count.append(1))
        model.train()
        client_losses(model, collate(GROUPS)).sum().backward()
        calls.append(len(count))
    assert calls == [1, 2]


def test_the_frozen_base_never_drops() -> None:
    """GPT-2 comes with dropout 0.1; drawing it would tie clients together through one random stream."""
    model, _ = loaded(gpt2())
    model.train()
    batch = collate(GROUPS)
    assert torch.equal(client_losses(model, batch), client_losses(model, batch))


def test_a_base_that_cuts_the_graph_is_noticed() -> None:
    """A layer without gradients in the middle must not leave adapters below it silently untrained."""
    model, _ = loaded(llama())
    model.base.model.layers[1].register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(RuntimeError):
        train(model, plans_of(ROWS, CLIP), CLIP)
