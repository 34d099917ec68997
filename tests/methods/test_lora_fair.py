"""LoRA-FAIR's descent against autograd on dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedalt.methods.algebra import Weighted
from fedalt.methods.lora_fair import LoRAFair, descend
from support import quick


def parts(seed: int, clients: int = 3, r: int = 2) -> list[Weighted]:
    """Uploads whose A have drifted a little from one start, as in training."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(r, 6, generator=generator)
    q = torch.rand(clients, generator=generator) + 0.1
    return [
        (
            start + 0.5 * torch.randn(r, 6, generator=generator),
            torch.randn(5, r, generator=generator),
            float(w / q.sum()),
        )
        for w in q
    ]


def means(given_: list[Weighted]) -> tuple[Tensor, Tensor, Tensor]:
    """Ā, B̄ and the mean of products."""
    a = sum(q * a.double() for a, _, q in given_)
    b = sum(q * b.double() for _, b, q in given_)
    return a, b, sum(q * b.double() @ a.double() for a, b, q in given_)  # type: ignore[return-value]


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum() / (one.norm() * other.norm())


@pytest.mark.parametrize("weight", [0.0, 0.01, 0.3])
def test_descent_is_that_of_autograd_with_a_proximal_step(weight: float) -> None:
    """ΔB ← prox of ηλ‖·‖ at ΔB − η ∇(1 − cos)."""
    given_ = parts(1)
    a, b, target = means(given_)
    delta = torch.zeros_like(b)
    for _ in range(7):
        leaf = delta.clone().requires_grad_()
        (slope,) = torch.autograd.grad(1 - cosine(target, (b + leaf) @ a), leaf)
        moved = delta - 0.2 * slope
        delta = moved * max(0.0, 1 - 0.2 * weight / float(moved.norm()))
    got_a, got_b = descend(given_, LoRAFair.Settings(weight=weight, lr=0.2, steps=7))
    torch.testing.assert_close(got_a, a)
    torch.testing.assert_close(got_b, b + delta, rtol=1e-6, atol=1e-7)


@quick
@given(st.integers(0, 999))
def test_the_corrected_product_is_closer_in_direction(seed: int) -> None:
    given_ = parts(seed)
    a, b, target = means(given_)
    _, corrected = descend(given_, LoRAFair.Settings(weight=0.0, lr=0.1, steps=200))
    before, after = cosine(target, b @ a), cosine(target, corrected @ a)
    assert after >= before - 1e-12
    projected = target @ torch.linalg.pinv(a) @ a
    assert after <= cosine(target, projected) + 1e-9, "no product with this A is closer than the projection"


@pytest.mark.parametrize("weight", [0.0, 0.01])
def test_where_there_is_nothing_to_correct_nothing_is(weight: float) -> None:
    """One client of one number: the slope is 0, and so is the norm that it is divided by."""
    a, b = torch.ones(1, 1), 2 * torch.ones(1, 1)
    got = descend([(a, b, 1.0)], LoRAFair.Settings(weight=weight, steps=3))
    assert [value.item() for value in got] == [1, 2]


def test_a_correction_that_costs_too_much_is_not_made() -> None:
    given_ = parts(3)
    assert torch.equal(descend(given_, LoRAFair.Settings(weight=1e9))[1], means(given_)[1])


@pytest.mark.parametrize("zero", ["A", "B", "mean"])
def test_without_a_direction_nothing_is_corrected(zero: str) -> None:
    """A cosine with zero is undefined: factor means it is, and no NaN."""
    given_ = parts(4, clients=2)
    if zero == "mean":
        (a, b, _), _ = given_
        given_ = [(a, b, 0.5), (a, -b, 0.5)]
    else:
        given_ = [(a * (zero == "B"), b * (zero == "A"), q) for a, b, q in given_]
    got_a, got_b = descend(given_, LoRAFair.Settings(steps=3))
    a, b, _ = means(given_)
    assert torch.equal(got_a, a) and torch.equal(got_b, b)
