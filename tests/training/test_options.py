"""What a client does with its rows, held to torch's optimisers, transformers' schedules and one large batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from classifiers import adapted
from classifiers import examples as rows_of
from fedalt.config import TrainingConfig
from fedalt.data.batches import plan_round
from fedalt.model.adapted import AdaptedModel
from fedalt.model.state import load_state, save_state
from fedalt.names import Key
from fedalt.testing import TinyFederation
from fedalt.training.loop import learning_rates
from oracle.reference import PlainClient
from support import (
    MODELS,
    PAD,
    SCALE,
    bitwise,
    distance,
    examples,
    llama,
    method_of,
    plans_of,
    run_rounds,
    shape_of,
    start_states,
    training,
)

ROWS = {client: examples(count, seed=30 + client) for client, count in enumerate((11, 6, 4))}
STEPS: dict[str, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


def ends(config: TrainingConfig, method: str = "fedalt", rounds: int = 2, dropout: float = 0.0, **others: Any) -> Any:
    """Every client's last state."""
    model = AdaptedModel(others.pop("model", llama)())
    history, _ = run_rounds(model, method_of(method, len(ROWS)), ROWS, config, rounds, dropout, **others)
    return {result.state.client: result.state for results in history for result in results}


def farthest(one: Any, other: Any) -> float:
    return max(distance(one[client].tensors, other[client].tensors) for client in one)


# ------------------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize("order", ["strict", "bucketed"])
@pytest.mark.parametrize(("name", "method"), [("llama", "fedalt"), ("gpt2", "pf2lora"), ("bloom", "fedprox")])
def test_accumulated_batches_are_one_large_batch(name: str, method: str, order: str) -> None:
    """With dropout, rows of many lengths and last steps of fewer rows; by all rules, a penalty's, too."""
    large, small = training(batch_size=6, order=order), training(batch_size=2, accumulate=3, order=order)
    one, other = (ends(config, method, dropout=0.3, model=MODELS[name]) for config in (large, small))
    assert farthest(one, other) < 2e-6
    assert farthest(one, ends(training(batch_size=2), method, dropout=0.3, model=MODELS[name])) > 1e-3


def test_an_accumulated_step_is_weighted_by_token() -> None:
    """One step of SGD without clipping, against the gradient of a single batch of the plain model."""
    config = training(
        batch_size=2, accumulate=4, max_steps=1, optimizer="sgd", schedule="constant", weight_decay=0, max_grad_norm=1e9
    )
    model, method = AdaptedModel(llama()), method_of("local", len(ROWS))
    start = start_states(method, shape_of(method, model.layer_sizes), ROWS)
    history, _ = run_rounds(model, method, ROWS, config, 1, states=start)
    for result, before, (plan,) in zip(history[0], start, zip(plans_of(ROWS, config), strict=True), strict=True):
        plain = PlainClient(llama(), before.tensors, SCALE)
        loss = plain.loss(plan.steps[0], PAD)
        loss.backward()
        assert result.stats.loss == pytest.approx(loss.item(), rel=1e-5)
        for key, parameter in plain.parameters.items():
            assert parameter.grad is not None
            moved = before.tensors[Key(*key)] - config.lr * parameter.grad
            torch.testing.assert_close(result.state.tensors[Key(*key)], moved, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_accumulated_rows_of_classifiers_are_one_large_batch(kind: str) -> None:
    states = []
    for config in (training(batch_size=6), training(batch_size=2, accumulate=3)):
        model, method = adapted(kind), method_of("fedit", 2)
        rows = {client: rows_of(kind, count, client) for client, count in enumerate((9, 4))}
        start = [
            replace(s, heads=dict(model.head_start))
            for s in start_states(method, shape_of(method, model.layer_sizes), rows)
        ]
        history, _ = run_rounds(model, method, rows, config, 1, states=start, dropout=0.2)
        states.append([result.state for result in history[0]])
    for one, other in zip(*states, strict=True):
        assert distance({**one.tensors, **one.heads}, {**other.tensors, **other.heads}) < 2e-6


def test_the_mixers_weights_of_an_accumulated_step_are_those_of_its_tokens() -> None:
    alphas = []
    for config in (training(batch_size=6), training(batch_size=2, accumulate=3)):
        history, _ = run_rounds(AdaptedModel(llama()), method_of("fedalt", len(ROWS)), ROWS, config, 2)
        alphas.append(torch.tensor([result.stats.alpha for result in history[1]]))
    torch.testing.assert_close(alphas[0], alphas[1], rtol=0, atol=1e-6)
    assert float((alphas[0] - 0.5).abs().max()) > 1e-3


def test_a_part_of_a_step_is_as_large_as_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedalt.training import loss

    sizes: list[int] = []
    plain = loss.client_losses
    monkeypatch.setattr(
        loss, "client_losses", lambda m, b, *rest: sizes.append(max(b.rows.sizes)) or plain(m, b, *rest)
    )
    ends(training(batch_size=2, accumulate=3, local_epochs=1), rounds=1)
    assert max(sizes) == 2 and len(sizes) == 3 + 3  # 11 rows are steps of 6 and 5


# ---------------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("warmup", [0, 3, 0.25, 40])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_learning_rates_are_those_of_transformers(schedule: str, warmup: float) -> None:
    config, lengths, rounds = training(schedule=schedule, warmup=warmup), torch.tensor([7, 1, 4]), 3
    name = "constant_with_warmup" if schedule == "constant" else schedule
    for turns in (1, rounds):
        for k, length in enumerate(lengths.tolist()):
            total = turns * length
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
            warm = int(warmup) if warmup >= 1 else -int(-warmup * total // 1)
            scheduler = get_scheduler(name, optimizer, warm, total)
            for step in range(total):
                turn = (step // length + 1, turns)
                assert float(learning_rates(config, step % length, lengths, turn)[k]) == pytest.approx(
                    optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-12
                )
                optimizer.step()
                scheduler.step()


def test_a_constant_rate_and_a_linear_one_are_what_they_were() -> None:
    lengths = torch.tensor([7, 3, 90, 0])
    for step in range(90):
        assert torch.equal(learning_rates(training(), step, lengths[:3]), 5e-3 * (1 - step / lengths[:3]).clamp(min=0))
    assert torch.equal(learning_rates(training(schedule="constant"), 2, lengths), 5e-3 * torch.ones(4))


# ----------------------------------------------------------------------------------------------------------- whole runs

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1},
    "sgd": {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1},
    "momentum": {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
}


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kept", [True, False], ids=["persist", "reset"])
def test_rounds_of_local_training_are_a_literal_loop(name: str, schedule: str, kept: bool) -> None:
    """With kept moments and one schedule, three rounds are one uninterrupted training by torch and transformers."""
    rounds, own = 3, OPTIMIZERS[name]
    scope, state = ("run", "persist") if kept else ("round", "reset")
    config = training(schedule=schedule, warmup=2, schedule_scope=scope, optimizer_state=state, **own)
    method, model = method_of("local", len(ROWS), federation__rounds=rounds), AdaptedModel(llama())
    start = start_states(method, shape_of(method, model.layer_sizes), ROWS)
    history, _ = run_rounds(model, method, ROWS, config, rounds, states=start)
    for client, before in enumerate(start):
        plain = PlainClient(llama(), before.tensors, SCALE)
        parameters = list(plain.parameters.values())
        turns = [plans_of(ROWS, config, n)[client].steps for n in range(1, rounds + 1)]
        for steps in [sum(turns, ())] if kept else turns:
            wanted = {"lr": config.lr, "weight_decay": 0.1}
            wanted |= {k: v for k, v in own.items() if k in ("betas", "eps", "momentum")}
            optimizer = STEPS[own["optimizer"]](parameters, **wanted)
            scheduler = get_scheduler(schedule, optimizer, 2, len(steps))
            for rows in steps:
                optimizer.zero_grad()
                plain.loss(rows, PAD).backward()
                torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
                scheduler.step()
        last = history[-1][client].state.tensors
        for key, parameter in plain.parameters.items():
            travelled = float((parameter - before.tensors[Key(*key)]).detach().abs().max())
            assert float((last[Key(*key)] - parameter).detach().abs().max()) < 1e-3 * travelled


def test_max_steps_stands_in_place_of_epochs() -> None:
    plans = [plan_round(ROWS[2], 2, training(max_steps=most), 5, 1) for most in (1, 5)]
    assert [len(plan.steps) for plan in plans] == [1, 5], "four rows are one step an epoch"
    assert plans[1].steps[0] == plans[0].steps[0] == plan_round(ROWS[2], 2, training(), 5, 1).steps[0]
    assert all({id(row) for row in step} == {id(row) for row in ROWS[2]} for step in plans[1].steps)
    assert len(set(plans[1].steps)) > 1, "each time in an order of its own"


EVERYTHING: dict[str, Any] = {
    "accumulate": 2,
    "batch_size": 2,
    "schedule": "cosine",
    "warmup": 0.2,
    "schedule_scope": "run",
    "optimizer_state": "persist",
    "betas": (0.8, 0.95),
    "max_steps": 3,
}


@pytest.mark.parametrize("method", ["fedalt", "feddpa_t", "pf2lora", "fdlora", "flora", "hetlora"])
def test_executors_agree_on_all_of_it(method: str) -> None:
    chosen = [(0, 1, 2), (1, 2), (0, 2), (0, 1, 2)]
    config = training(**EVERYTHING)
    both = [ends(config, method, 4, 0.2, chosen=chosen, **how) for how in ({}, {"executor": "loop"}, {"cohort": 2})]
    assert farthest(both[0], both[1]) < 1e-4 and farthest(both[0], both[2]) < 1e-4


# ------------------------------------------------------------------------------------------------------------- moments


def federation(method: str = "feddpa_t", **changes: Any) -> TinyFederation:
    config = training(**{"optimizer_state": "persist", "local_epochs": 1} | changes)
    return TinyFederation(AdaptedModel(llama()), method_of(method, len(ROWS)), ROWS, config, dropout=0.1)


def test_every_tensor_has_moments_and_steps_of_its_own() -> None:
    """FedDPA-T trains the global LoRA from the first round on, the local one, in phases of its own, from the second."""
    tiny = federation()
    for number in (1, 2, 3):
        results = tiny.round(number)
    for result in results:
        state, steps = result.state.optimizer, len(plans_of(ROWS, tiny.settings.training)[result.state.client].steps)
        assert state.keys() == {"first", "second", "steps"}
        assert {key.slot: int(value) for key, value in state["steps"].items()} == {
            "global": 3 * steps,
            "local": 2 * steps,
        }
        assert all(float(value.abs().max()) > 0 for value in state["second"].values())


def test_a_client_that_is_absent_keeps_its_moments_and_nothing_of_them_is_sent(tmp_path: Path) -> None:
    tiny = federation("fedalt")
    first = tiny.round(1)
    tiny.round(2, (1, 2))
    assert tiny.states[0] is first[0].state
    again = tiny.round(3)[0]
    before, after = (one.state.optimizer["first"] for one in (first[0], again))
    assert before.keys() == after.keys() and not bitwise(before, after)
    assert set(again.upload) == {key for key in again.state.tensors if tiny.method.shares(key)}
    save_state(again.state, tmp_path / "state")
    loaded = load_state(tmp_path / "state")
    assert bitwise(loaded.tensors, again.state.tensors)
    assert all(bitwise(loaded.optimizer[name], part) for name, part in again.state.optimizer.items())


def test_moments_that_start_anew_are_not_kept() -> None:
    assert not federation(optimizer_state="reset").round(1)[0].state.optimizer


def test_a_client_that_fails_keeps_the_moments_it_came_with() -> None:
    tiny = federation("fedalt")
    before = tiny.round(1)[1].state
    tiny.states[0] = tiny.states[0].with_tensors({k: v * torch.nan for k, v in tiny.states[0].tensors.items()})
    failed, fine, _ = tiny.round(2)
    assert failed.failure and failed.state is tiny.states[0]
    assert not fine.failure and not bitwise(fine.state.optimizer["first"], before.optimizer["first"])


def test_a_lora_that_starts_anew_has_no_moments_of_the_old_one() -> None:
    tiny = federation("flora")
    tiny.round(1)
    steps = {int(value) for value in tiny.round(2)[0].state.optimizer["steps"].values()}
    assert steps == {len(plans_of(ROWS, tiny.settings.training)[0].steps)}


def test_what_hetlora_has_pruned_stays_pruned() -> None:
    config = training(optimizer_state="persist", lr=0.05)
    method = method_of("hetlora", len(ROWS), hetlora__tail=0.5, hetlora__decay=5.0)
    model = AdaptedModel(llama())
    history, _ = run_rounds(model, method, ROWS, config, 4)
    for client in ROWS:
        ranks = [
            min(
                int((r[client].state.tensors[k].abs().sum(1) > 0).sum())
                for k in r[client].state.tensors
                if k.factor == "A"
            )
            for r in history
        ]
        assert (ranks == sorted(ranks, reverse=True) and ranks[-1] < ranks[0]) or ranks[0] == 1
