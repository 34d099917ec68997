"""Stacked AdamW is K times torch's AdamW with torch's clipping."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedalt.training.optimizer import _TOGETHER, StackedAdamW
from support import quick

Snapshot = list[Tensor]


def draw(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def everything(optimizer: StackedAdamW, client: int) -> Snapshot:
    memory = [value for parameter in optimizer.parameters for value in optimizer.memory(parameter).values()]
    return [tensor[client].detach().clone() for tensor in [*optimizer.parameters, *memory]]


def same(one: Snapshot, other: Snapshot) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@quick
@given(
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3),
    rates=st.lists(st.floats(1e-4, 1e-1), min_size=1, max_size=4),
    decay=st.sampled_from([0.0, 0.05, 0.5]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    turns=st.lists(st.integers(1, 15), min_size=1, max_size=6),
    together=st.sampled_from([1, 40, 1 << 18]),
)
def test_equals_torch_per_client(
    shapes: list[tuple[int, int]], rates: list[float], decay: float, scale: float, turns: list[int], together: int
) -> None:
    """``turns`` holds one bit mask of active clients per step; inactive clients have no step in the reference."""
    k = len(rates)
    shapes = [*shapes, *shapes]  # some are alike and move together, as far as ``together`` goes
    start = [draw((k, *shape), seed) for seed, shape in enumerate(shapes)]
    with mock.patch.dict(_TOGETHER, cpu=together):
        stacked = StackedAdamW([nn.Parameter(p.clone()) for p in start], decay, max_grad_norm=1.0)
    alone = [[nn.Parameter(p[i].clone()) for p in start] for i in range(k)]
    references = [torch.optim.AdamW(mine, lr=1.0, weight_decay=decay) for mine in alone]
    lr = torch.tensor(rates)
    for step, mask in enumerate(turns):
        grads = [draw(tuple(p.shape), 100 * step + i, scale) for i, p in enumerate(start, 1)]
        active = torch.tensor([bool(mask >> i & 1) for i in range(k)])
        for parameter, grad in zip(stacked.parameters, grads, strict=True):
            parameter.grad = grad.clone()
        stacked.step(lr * (step + 1), active)
        for i in active.nonzero().flatten().tolist():
            for parameter, grad in zip(alone[i], grads, strict=True):
                parameter.grad = grad[i].clone()
            torch.nn.utils.clip_grad_norm_(alone[i], 1.0)
            references[i].param_groups[0]["lr"] = rates[i] * (step + 1)
            references[i].step()
    travelled = float(lr.max()) * sum(range(1, len(turns) + 1))
    for i, mine in enumerate(alone):
        for parameter, expected in zip(stacked.parameters, mine, strict=True):
            torch.testing.assert_close(parameter[i], expected, rtol=1e-6, atol=2e-6 * travelled)


def test_gradients_are_clipped_per_client_not_together() -> None:
    optimizer = StackedAdamW([nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(2, 1))], 0.0, 1.0)
    small, large = torch.full((3,), 0.1), torch.full((3,), 40.0)
    optimizer.parameters[0].grad = torch.stack([small, large])
    optimizer.parameters[1].grad = torch.tensor([[0.0], [30.0]])
    norm = (3 * 40.0**2 + 30.0**2) ** 0.5
    assert optimizer.clip_factors().tolist() == pytest.approx([1.0, 1 / norm], rel=1e-5)


def test_inactive_clients_keep_parameters_moments_and_steps_bit_for_bit() -> None:
    optimizer = StackedAdamW([nn.Parameter(draw((3, 4, 2), 0)), nn.Parameter(draw((3, 5), 1))], 0.5, 1.0)

    def step(active: list[bool], seed: int) -> None:
        for i, parameter in enumerate(optimizer.parameters):
            parameter.grad = draw(tuple(parameter.shape), seed + i)
        optimizer.step(torch.full((3,), 0.1), torch.tensor(active))

    step([True, True, False], 10)
    before = [everything(optimizer, k) for k in range(3)]
    step([False, True, False], 20)
    assert same(everything(optimizer, 0), before[0])
    assert not same(everything(optimizer, 1), before[1])
    assert same(everything(optimizer, 2), before[2])
    assert [optimizer.memory(parameter)["steps"].tolist() for parameter in optimizer.parameters] == [[1, 2, 0]] * 2


def test_a_client_that_never_stepped_survives_the_steps_of_others() -> None:
    """Its bias corrections are 0/0, which must not leak into its parameters."""
    optimizer = StackedAdamW([nn.Parameter(draw((2, 3), 0))], 0.5, 1.0)
    optimizer.parameters[0].grad = draw((2, 3), 1)
    before = everything(optimizer, 1)
    optimizer.step(torch.full((2,), 0.1), torch.tensor([True, False]))
    assert same(everything(optimizer, 1), before)


def test_a_gradient_that_is_not_finite_stays_with_its_client() -> None:
    optimizer, reference = (StackedAdamW([nn.Parameter(draw((2, 3), 0))], 0.1, 1.0) for _ in range(2))
    for each in (optimizer, reference):
        each.parameters[0].grad = draw((2, 3), 1)
    optimizer.parameters[0].grad[1] = torch.nan  # type: ignore[index]
    for each in (optimizer, reference):
        each.step(torch.full((2,), 0.1), torch.tensor([True, True]))
    assert same(everything(optimizer, 0), everything(reference, 0))
    assert not optimizer.parameters[0][1].isfinite().any()


def test_gradients_are_cleared_after_a_step_and_missing_ones_are_an_error() -> None:
    optimizer = StackedAdamW([nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.ones(1, 3))], 0.0, 1.0)
    optimizer.parameters[0].grad = torch.ones(1, 2)
    with pytest.raises(RuntimeError, match="no gradient"):
        optimizer.step(torch.ones(1), torch.tensor([True]))
    optimizer.parameters[1].grad = torch.ones(1, 3)
    optimizer.step(torch.ones(1), torch.tensor([True]))
    assert all(parameter.grad is None for parameter in optimizer.parameters)
