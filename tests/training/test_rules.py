"""Ways to take a step: two levels against autograd and finite differences, HetLoRA's penalty against its formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedalt.data.batches import collate
from fedalt.methods.hetlora import HetLoRA
from fedalt.model.adapted import AdaptedModel
from fedalt.model.layer import Placement
from fedalt.model.state import ClientState
from fedalt.names import GLOBAL, PRIVATE, A, B, Key
from fedalt.training.loss import client_losses
from fedalt.training.optimizer import Bilevel, StackedAdamW
from support import SCALE, examples, llama, method_of, random_states, shape_of

CLIENTS, BETA = 3, 0.05
X, Y = (Key("m", GLOBAL, A), Key("n", GLOBAL, B)), (Key("m", PRIVATE, A), Key("n", PRIVATE, B))
Function = Callable[[list[Tensor], list[Tensor]], Tensor]
"""Losses of all clients for upper and lower tensors."""


class Recorder(StackedAdamW):
    """Remembers the gradients that it is given, and takes no step."""

    def step(self, lr: Tensor, active: Tensor) -> None:
        self.grads = [p.grad.clone() for p in self.parameters if p.grad is not None]


def parameters() -> dict[Key, nn.Parameter]:
    generator = torch.Generator().manual_seed(4)
    sizes = dict(zip((*X, *Y), ((2, 3), (3, 2), (1, 3), (3, 1)), strict=True))
    return {
        key: nn.Parameter(torch.randn(CLIENTS, *size, generator=generator, dtype=torch.float64))
        for key, size in sizes.items()
    }


def flat(values: list[Tensor]) -> Tensor:
    return torch.cat([value.flatten(1) for value in values], 1)


def quadratic(x: list[Tensor], y: list[Tensor]) -> Tensor:
    """½ zᵀ H_k z + c_kᵀ z, z = (x, y), with another H and c for every client."""
    z = flat([*x, *y])
    generator = torch.Generator().manual_seed(8)
    root = torch.randn(CLIENTS, z.shape[1], z.shape[1], generator=generator, dtype=z.dtype)
    c = torch.randn(CLIENTS, z.shape[1], generator=generator, dtype=z.dtype)
    curved: Tensor = torch.einsum("ki,kij,kj->k", z, root @ root.mT, z) / 2
    return curved + (c * z).sum(1)


def quartic(x: list[Tensor], y: list[Tensor]) -> Tensor:
    """Its mixed derivatives change from place to place."""
    u, v = flat(x), flat(y)
    return (u.sin().sum(1) * v.square().sum(1)) + (u[:, : v.shape[1]] * v).square().sum(1)


def looked_through(f: Function, x: list[Tensor], y: list[Tensor], beta: Tensor) -> Tensor:
    """φ(x) = f(x, y − β ∇_y f(x, y)), differentiable in x."""
    y = [value.detach().requires_grad_() for value in y]
    slopes = torch.autograd.grad(f(x, y).sum(), y, create_graph=True)
    return f(x, [value - beta.view(-1, 1, 1) * slope for value, slope in zip(y, slopes, strict=True)])


def take(
    rule: Bilevel, f: Function, trainable: dict[Key, nn.Parameter], lr: Tensor, active: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """A step's losses, and the gradients that its optimiser sees."""
    recorder = Recorder([trainable[key] for key in X], 0.0, 1.0)
    losses = rule(lambda: f([trainable[k] for k in X], [trainable[k] for k in Y]), trainable, recorder, lr, active)  # type: ignore[arg-type]
    return losses, recorder.grads


@pytest.mark.parametrize("f", [quadratic, quartic])
@pytest.mark.parametrize("lr", [None, 0.01])
def test_two_levels_are_those_of_autograd(f: Function, lr: float | None) -> None:
    """Every client has a learning rate of its own; the lower one is the same for all when it is given."""
    rates, active = torch.tensor([0.05, 0.02, 0.0]), torch.ones(CLIENTS, dtype=torch.bool)
    beta = (rates if lr is None else torch.full((CLIENTS,), lr)).double()
    expected = parameters()
    x, y = ([expected[key] for key in keys] for keys in (X, Y))
    values = f(x, y)
    slopes = torch.autograd.grad(values.sum(), y)
    y_after = [value.detach() - beta.view(-1, 1, 1) * slope for value, slope in zip(y, slopes, strict=True)]
    first = torch.autograd.grad(f(x, y_after).sum(), x)
    unrolled = torch.autograd.grad(looked_through(f, x, y, beta).sum(), x)
    for through, grads in ((False, first), (True, unrolled)):
        mine = parameters()
        losses, got = take(Bilevel(PRIVATE, lr, through), f, mine, rates, active)
        torch.testing.assert_close(losses, values.detach())
        for one, other in zip(got, grads, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4 if f is quartic else 1e-8, atol=1e-8)
        for key, value in zip(Y, y_after, strict=True):
            torch.testing.assert_close(mine[key].detach(), value, rtol=1e-12, atol=1e-12)
        assert all(torch.equal(mine[key], expected[key]) for key in X)
    gap = [float((a - b).flatten(1).abs().amax(1)[0]) for a, b in zip(first, unrolled, strict=True)]
    assert max(gap) > 1e-2, "otherwise one of the two tests the other"


def test_the_unrolled_gradient_is_that_of_finite_differences() -> None:
    mine, rates = parameters(), torch.full((CLIENTS,), BETA)
    _, got = take(Bilevel(PRIVATE, None, True, reach=1e-4), quartic, mine, rates, torch.ones(CLIENTS, dtype=torch.bool))
    x, y = ([parameters()[key].detach() for key in keys] for keys in (X, Y))
    h = 1e-6
    for i, key in enumerate(X):
        for at in np.ndindex(*parameters()[key].shape[1:]):
            ends = []
            for sign in (1, -1):
                moved = [value.clone() for value in x]
                moved[i][:, *at] += sign * h  # all clients at once: each has a loss of its own
                ends.append(looked_through(quartic, moved, y, rates.double()).detach())
            torch.testing.assert_close(got[i][:, *at], (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unrolled", [False, True])
def test_two_levels_leave_inactive_clients_untouched(unrolled: bool) -> None:
    """Client 1 has no rows in this step, so its loss is 0 wherever it is."""
    mine, before = parameters(), parameters()
    active = torch.tensor([True, False, True])
    optimizer = StackedAdamW([mine[key] for key in X], 0.1, 1.0)
    losses = partial(_masked, mine, active)
    Bilevel(PRIVATE, 0.1, unrolled)(losses, mine, optimizer, torch.full((CLIENTS,), 0.1), active)
    for key, value in mine.items():
        assert torch.equal(value[1], before[key][1])
        assert not torch.equal(value[0], before[key][0])
        assert value.isfinite().all()


def _masked(mine: dict[Key, nn.Parameter], active: Tensor) -> Tensor:
    return quartic([mine[k] for k in X], [mine[k] for k in Y]) * active


def test_only_the_upper_tensors_are_the_optimisers() -> None:
    rule = Bilevel(PRIVATE)
    assert [rule.by_optimizer(key) for key in (*X, *Y)] == [True, True, False, False]


@pytest.mark.parametrize("unrolled", [False, True])
def test_two_levels_on_a_model(unrolled: bool) -> None:
    """Along random directions the gradient is the slope of φ; first order, that of f at the new y.

    Llama's norms work in fp32, even on an fp64 model.
    """
    model = AdaptedModel(llama().double())
    method = method_of("pf2lora")
    shape = shape_of(method, model.layer_sizes)
    states = [s.with_tensors({k: v.double() for k, v in s.tensors.items()}) for s in random_states(shape)]
    model.load(states, Placement(method.slot_names, method.mixing, SCALE, 0.0), list(shape.shapes()))
    batch = collate([examples(count, seed=40 + k) for k, count in enumerate((3, 2, 4))])
    f = partial(client_losses, model, batch)
    upper = {key: p for key, p in model.trainable.items() if key.slot == GLOBAL}
    lower = {key: p for key, p in model.trainable.items() if key.slot == PRIVATE}
    start = {key: p.detach().clone() for key, p in model.trainable.items()}
    rates = torch.full((CLIENTS,), 0.1)

    def put(values: dict[Key, Tensor]) -> None:
        with torch.no_grad():
            for key, value in values.items():
                model.trainable[key].copy_(value)

    def phi(direction: dict[Key, Tensor], h: float, y: dict[Key, Tensor] | None) -> Tensor:
        put(start | {key: start[key] + h * value for key, value in direction.items()})
        if y is None:
            slopes = torch.autograd.grad(f().sum(), list(lower.values()))
            y = {key: start[key] - 0.1 * slope for key, slope in zip(lower, slopes, strict=True)}
        put(y)
        return f().detach()

    fixed = None if unrolled else {k: start[k] - 0.1 * g for k, g in _slopes(f, lower).items()}
    recorder = Recorder(list(upper.values()), 0.0, 1.0)
    put(start)
    Bilevel(PRIVATE, None, unrolled)(f, model.trainable, recorder, rates, torch.ones(CLIENTS, dtype=torch.bool))
    grads = dict(zip(upper, recorder.grads, strict=True))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = {
            k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in start.items() if k in upper
        }
        slope = (phi(direction, 3e-4, fixed) - phi(direction, -3e-4, fixed)) / 6e-4
        got = sum((grads[key] * value).flatten(1).sum(1) for key, value in direction.items())
        torch.testing.assert_close(got, slope, rtol=1e-2, atol=1e-2)  # type: ignore[arg-type]


def _slopes(f: Callable[[], Tensor], lower: dict[Key, nn.Parameter]) -> dict[Key, Tensor]:
    return dict(zip(lower, torch.autograd.grad(f().sum(), list(lower.values())), strict=True))


# -------------------------------------------------------------------------------------------------------------- HetLoRA


def penalised(tail: float, decay: float, tensors: dict[Key, Tensor]) -> tuple[Tensor, dict[Key, nn.Parameter]]:
    method = method_of("hetlora", lora__r=4, hetlora__tail=tail, hetlora__decay=decay)
    assert isinstance(method, HetLoRA)
    trainable = {key: nn.Parameter(value.clone()) for key, value in tensors.items()}
    return method.penalty(trainable, tensors), trainable


def factors(ranks: tuple[int, ...] = (4, 4, 2)) -> dict[Key, Tensor]:
    """Two layers; clients of lower rank have zeros behind it."""
    generator = torch.Generator().manual_seed(6)
    tensors = {
        Key(module, GLOBAL, factor): torch.randn(len(ranks), *size, generator=generator)
        for module, d in (("m", 5), ("n", 3))
        for factor, size in ((A, (4, d)), (B, (d, 4)))
    }
    for k, rank in enumerate(ranks):
        for key, value in tensors.items():
            (value[k, rank:] if key.factor == A else value[k, :, rank:]).zero_()
    return tensors


@pytest.mark.parametrize(("tail", "starts"), [(0.99, (3, 3, 1)), (0.5, (2, 2, 1)), (1.0, (4, 4, 2))])
def test_hetloras_penalty_is_the_size_of_every_clients_own_tail(tail: float, starts: tuple[int, ...]) -> None:
    tensors = factors()
    got, _ = penalised(tail, 0.3, tensors)
    for k, start in enumerate(starts):
        tails = [
            np.linalg.norm(tensors[Key(m, GLOBAL, B)][k, :, start:])
            * np.linalg.norm(tensors[Key(m, GLOBAL, A)][k, start:])
            for m in ("m", "n")
        ]
        assert got[k].item() == pytest.approx(0.3 * sum(tails), rel=1e-5, abs=1e-12)


def test_hetloras_penalty_has_a_gradient_where_there_is_a_tail_and_none_at_zero() -> None:
    tensors = factors()
    got, trainable = penalised(0.5, 1.0, tensors)
    got.sum().backward()
    a, b = tensors[Key("m", GLOBAL, A)][0, 2:], tensors[Key("m", GLOBAL, B)][0, :, 2:]
    grad = trainable[Key("m", GLOBAL, A)].grad
    torch.testing.assert_close(grad[0, 2:], b.norm() * a / a.norm())  # type: ignore[index]
    assert not grad[0, :2].any()  # type: ignore[index]
    untrained = {key: value * (key.factor == A) for key, value in tensors.items()}
    got, trainable = penalised(0.5, 1.0, untrained)
    got.sum().backward()
    assert float(got.detach().abs().max()) < 1e-9
    assert all(float(p.grad.abs().max()) < 1e-9 for p in trainable.values())  # type: ignore[union-attr]


def test_the_penalty_and_the_pruning_begin_at_the_same_rank() -> None:
    """0.57 · 100 is 56.99… in fp64 and 57 in fp32."""
    method = method_of("hetlora", 1, lora__r=100, hetlora__tail=0.57)
    assert isinstance(method, HetLoRA)
    tensors = {Key("m", GLOBAL, A): torch.ones(100, 3), Key("m", GLOBAL, B): torch.ones(3, 100)}
    began = ClientState(0, 1, {key: 2 * value for key, value in tensors.items()})
    pruned = method.after_training(replace(began, tensors=tensors), began, 1).tensors[Key("m", GLOBAL, A)]
    start = int((pruned.abs().sum(1) > 0).sum())
    trainable = {key: nn.Parameter(value[None].clone()) for key, value in tensors.items()}
    method.penalty(trainable, {}).sum().backward()
    slopes = trainable[Key("m", GLOBAL, A)].grad
    assert slopes is not None
    assert int((slopes[0].abs().sum(1) > 0).float().argmax()) == start
