"""FDLoRA: the outer optimiser is torch's, the personal LoRA stays until its time, the fusion is searched for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedalt.data.batches import collate
from fedalt.methods import fdlora
from fedalt.methods.base import Gathered, Method
from fedalt.methods.fdlora import BOUND, VELOCITY, best_pairs, fused
from fedalt.model.adapted import AdaptedModel
from fedalt.model.layer import Placement
from fedalt.model.state import ClientState
from fedalt.names import FUSED, GLOBAL, PERSONAL, A, Key
from fedalt.training.loss import client_losses
from support import (
    SCALE,
    bitwise,
    examples,
    llama,
    method_of,
    quick,
    random_states,
    run_rounds,
    shape_of,
    training,
)

ROWS = {client: examples(count, seed=client) for client, count in enumerate((6, 9, 4))}
KEY = Key("m", GLOBAL, A)


@pytest.mark.parametrize(("eta", "mu"), [(0.7, 0.9), (1.0, 0.0), (0.3, 0.5)])
def test_the_outer_step_is_torchs_nesterov(eta: float, mu: float) -> None:
    """On the mean change, with unequal weights; the first round's mean is where it starts."""
    method = method_of("fdlora", fdlora__outer_lr=eta, fdlora__outer_momentum=mu)
    weights = {0: 1.0, 1: 3.0}
    generator = torch.Generator().manual_seed(3)
    sent = [{c: {KEY: torch.randn(2, 3, generator=generator)} for c in weights} for _ in range(5)]
    means = [(mine[0][KEY] + 3 * mine[1][KEY]) / 4 for mine in sent]
    literal = torch.nn.Parameter(means[0].clone())
    optimizer = torch.optim.SGD([literal], lr=eta, momentum=mu, nesterov=mu > 0)
    memory: Any = {}
    for round_, mine in enumerate(sent, 1):
        memory = method.server_update(Gathered(mine, weights, memory, round_))
        if round_ > 1:
            literal.grad = literal.detach() - means[round_ - 1]
            optimizer.step()
        torch.testing.assert_close(memory[KEY], literal.detach(), rtol=1e-5, atol=1e-6)
    told = method.client_messages(Gathered(sent[-1], weights, memory, 5))(7, 0)
    assert set(told.tensors) == {KEY}, "the velocity stays with the server"
    assert set(memory) == {KEY, KEY._replace(slot=VELOCITY)}


def test_the_personal_lora_is_renewed_every_so_often() -> None:
    """Trained in round 1, it is the shared one of rounds 3 and 5."""
    method = method_of("fdlora", fdlora__sync_every=2)
    history, _ = run_rounds(AdaptedModel(llama()), method, ROWS, training(local_epochs=1), 5)
    for client in ROWS:
        states = [results[client].state.tensors for results in history]
        personal, shared = (
            [{k._replace(slot=""): v for k, v in state.items() if k.slot == slot} for state in states]
            for slot in (PERSONAL, GLOBAL)
        )
        assert [bitwise(p, s) for p, s in zip(personal, shared, strict=True)] == [True, False, True, False, True]
        assert bitwise(personal[0], personal[1])
        assert bitwise(personal[2], personal[3])


@pytest.mark.parametrize("w", [(1.0, 0.0), (0.0, 1.0), (0.5, -1.5)])
def test_fusion_is_factor_by_factor(w: tuple[float, float]) -> None:
    (state, *_) = random_states(shape_of(method_of("fdlora"), {"m": (5, 3)}))
    for key, value in fused(state, w).tensors.items():
        if key.slot == FUSED:
            personal, shared = (state.tensors[key._replace(slot=slot)] for slot in (PERSONAL, GLOBAL))
            torch.testing.assert_close(value, w[0] * personal + w[1] * shared)
            assert w[1] or torch.equal(value, personal)
            assert w[0] or torch.equal(value, shared)


# ---------------------------------------------------------------------------------------------------------- the search


class Counted:
    """A cost that remembers what it was asked."""

    def __init__(self, cost: Callable[[Tensor], Tensor]) -> None:
        self.cost, self.asked = cost, list[Tensor]()

    def __call__(self, pairs: Tensor) -> Tensor:
        self.asked.append(pairs.clone())
        return self.cost(pairs)


@quick
@given(st.integers(9, 60), st.integers(1, 4), st.integers(0, 99))
def test_the_budget_is_kept_and_the_best_pair_is_returned(budget: int, clients: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    at = 4 * torch.rand(clients, 2, generator=generator, dtype=torch.float64) - 2
    cost = Counted(lambda w: (w - at).abs().sum(1))
    found = best_pairs(cost, clients, budget)
    assert len(cost.asked) == budget
    asked = torch.stack(cost.asked)  # [budget, k, 2]
    assert float(asked.abs().max()) <= BOUND and float(asked[..., 0].min()) >= 0
    assert [tuple(pair[0].tolist()) for pair in asked[:3]] == [(1, 0), (0, 1), (0.5, 0.5)]
    values = torch.stack([cost.cost(pairs) for pairs in asked])
    assert torch.equal(cost.cost(found), values.amin(0))


@pytest.mark.parametrize("at", [(0.3, 0.7), (1.2, -0.4), (2.5, 2.5), (0.0, 0.0)])
def test_forty_evaluations_come_near_the_minimum_of_a_valley(at: tuple[float, float]) -> None:
    found = best_pairs(lambda w: (w - torch.tensor(at)).square() @ torch.tensor([1.0, 3.0]).double(), 1, 40)
    assert float((found - torch.tensor(at)).abs().max()) < 0.15


def test_clients_are_searched_for_on_their_own() -> None:
    at = torch.tensor([[0.3, 0.7], [-1.2, 0.4], [1.0, 0.0]], dtype=torch.float64)
    together = best_pairs(lambda w: (w - at).square().sum(1), 3, 40)
    for k in range(3):
        alone = best_pairs(lambda w, k=k: (w - at[k]).square().sum(1), 1, 40)  # type: ignore[misc]
        assert torch.equal(alone[0], together[k])


def test_of_equal_costs_the_personal_lora_stays() -> None:
    assert best_pairs(lambda w: torch.zeros(len(w), dtype=torch.float64), 2, 40).tolist() == [[1, 0]] * 2


def test_a_sync_that_never_comes_is_noted() -> None:
    assert method_of("fdlora", federation__rounds=6).remarks() == []
    assert method_of("fdlora", federation__rounds=5).remarks() == [
        "fdlora.sync_every: 5 never comes to pass in 5 rounds: the personal LoRA trains in the first round only"
    ]


def personalised(method: Method, clients: tuple[int, ...] = (0, 1, 2)) -> tuple[AdaptedModel, list[ClientState]]:
    model = AdaptedModel(llama())
    states = random_states(shape_of(method, model.layer_sizes), clients)
    return model, method.personalise(model, states, ROWS, Placement(*method.inference, SCALE, 0.0))


def costs(model: AdaptedModel, states: list[ClientState], rows: Any, penalty: Any = 0.0) -> Tensor:
    model.load(states, Placement((FUSED,), method_of("fedit").mixing, SCALE, 0.0))
    with torch.no_grad():
        return client_losses(model, collate(rows)) + penalty


def test_a_fusion_is_no_worse_on_its_rows_than_either_lora_and_made_within_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(fdlora, "client_losses", lambda *args: calls.append(args) or client_losses(*args))
    method = method_of("fdlora", fdlora__few_shot=99, fdlora__budget=20, fdlora__penalty=0.0)
    model, states = personalised(method)
    assert len(calls) == 20
    rows = [ROWS[state.client] for state in states]
    best = costs(model, states, rows)
    for w in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
        assert (best <= costs(model, [fused(state, w) for state in states], rows) + 1e-5).all()


def test_a_heavy_penalty_takes_the_smallest_weights() -> None:
    """The grid of a budget of 21 has six points, (0, 0) among them."""
    method = method_of("fdlora", fdlora__few_shot=2, fdlora__budget=21, fdlora__penalty=1e6)
    _, states = personalised(method, (0,))
    assert not any(value.any() for key, value in states[0].tensors.items() if key.slot == FUSED)


def test_a_fusion_depends_on_the_clients_own_rows_alone() -> None:
    method = method_of("fdlora", fdlora__few_shot=2, fdlora__budget=12)
    _, together = personalised(method)
    for state in together:
        _, (alone,) = personalised(method, (state.client,))
        for key, value in alone.tensors.items():
            torch.testing.assert_close(value, state.tensors[key], rtol=0, atol=1e-6)
