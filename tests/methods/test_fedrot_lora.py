"""FedRot-LoRA: the rotation against a search over all of them, what it leaves alone, and what it is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedalt.methods.fedrot_lora import FedRotLoRA
from fedalt.model.adapted import AdaptedModel
from fedalt.model.state import ClientState
from fedalt.names import GLOBAL, A, B, Key
from support import (
    RANK,
    bitwise,
    distance,
    examples,
    llama,
    method_of,
    quick,
    random_states,
    run_rounds,
    shape_of,
    training,
)

ROWS = {client: examples(count, seed=client) for client, count in enumerate((7, 10, 3))}
CONFIG = training(max_grad_norm=0.5)
FITS = ["both", "A", "B"]


def pair(seed: int, r: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(r, 6, generator=generator, dtype=torch.float64),
        torch.randn(5, r, generator=generator, dtype=torch.float64),
    )


def gap(r: Tensor, mine: tuple[Tensor, Tensor], mean: tuple[Tensor, Tensor], fit: str) -> float:
    """‖R A − Ā‖² + ‖B Rᵀ − B̄‖², or one of them, entry by entry."""
    parts = {"A": ((r @ mine[0] - mean[0]) ** 2).sum(), "B": ((mine[1] @ r.T - mean[1]) ** 2).sum()}
    return float(sum(parts.values()) if fit == "both" else parts[fit])


@quick
@given(st.integers(0, 999), st.sampled_from(FITS))
def test_no_other_orthogonal_matrix_is_nearer(seed: int, fit: str) -> None:
    """All rotations and reflections of the plane, in steps of a third of a degree."""
    mine, mean = pair(seed), pair(seed + 1000)
    r = FedRotLoRA(fit=fit).rotation(mine, mean, 1)
    torch.testing.assert_close(r @ r.T, torch.eye(2, dtype=r.dtype))
    angles = torch.arange(1080, dtype=r.dtype) * (2 * torch.pi / 1080)
    found = []
    for c, s in zip(angles.cos(), angles.sin(), strict=True):
        for sign in (1, -1):
            other = torch.stack([torch.stack([c, -sign * s]), torch.stack([s, sign * c])])
            found.append(gap(other, mine, mean, fit))
    assert gap(r, mine, mean, fit) <= min(found) + 1e-9
    assert gap(r, mine, mean, fit) > min(found) - 1e-2, "the search is as good, up to its step"


@pytest.mark.parametrize(("round_", "factor"), [(1, "A"), (2, "B"), (3, "A")])
def test_factors_in_turn(round_: int, factor: str) -> None:
    mine, mean = pair(1), pair(2)
    expected = FedRotLoRA(fit=factor).rotation(mine, mean, 7)
    assert torch.equal(FedRotLoRA(fit="alternate").rotation(mine, mean, round_), expected)


@pytest.mark.parametrize("fit", [*FITS, "alternate"])
def test_the_product_does_not_change(fit: str) -> None:
    method = method_of("fedrot_lora", fedrot_lora__fit=fit)
    state, began, _ = random_states(shape_of(method, AdaptedModel(llama()).layer_sizes))
    after = method.after_training(state, began, 1)
    assert distance(after.tensors, state.tensors) > 1e-2
    for key, a in state.tensors.items():
        if key.factor == A:
            other = key._replace(factor=B)
            torch.testing.assert_close(
                after.tensors[other] @ after.tensors[key], state.tensors[other] @ a, rtol=1e-4, atol=1e-6
            )


class Still(FedRotLoRA):
    """FedRot-LoRA that never turns anything."""

    def rotation(self, mine: Any, mean: Any, round_: int) -> Tensor:
        return torch.eye(len(mine[0]), dtype=torch.float64)


def test_without_a_rotation_it_is_fedit() -> None:
    still = Still().bind(3, method_of("fedit").config)
    runs = [
        run_rounds(AdaptedModel(llama()), method, ROWS, CONFIG, 3, 0.2)[0] for method in (still, method_of("fedit"))
    ]
    for results, expected in zip(*runs, strict=True):
        for one, other in zip(results, expected, strict=True):
            assert bitwise(one.state.tensors, other.state.tensors)


def test_where_there_is_nothing_to_fit_nothing_turns() -> None:
    """B starts at zero everywhere."""
    a, b = pair(3)
    eye = torch.eye(2, dtype=a.dtype)
    assert torch.equal(FedRotLoRA(fit="B").rotation((a, b), (a, torch.zeros_like(b)), 1), eye)


def test_clients_that_differ_by_a_rotation_are_averaged_exactly() -> None:
    """Everybody has the mean's LoRA, each turned in a way of its own: FedIT's mean has another product."""
    method = method_of("fedrot_lora")
    began, *_ = random_states(shape_of(method, AdaptedModel(llama()).layer_sizes))
    module = next(key.module for key in began.tensors)
    a, b = (began.tensors[Key(module, GLOBAL, factor)] for factor in (A, B))
    uploads, plain = [], []
    for seed in range(3):
        q, _ = torch.linalg.qr(torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(seed)))
        turned = began.with_tensors({Key(module, GLOBAL, A): q @ a, Key(module, GLOBAL, B): b @ q.T})
        plain.append(turned.tensors)
        uploads.append(method.upload(method.after_training(turned, ClientState(0, 0, began.tensors), 1)))

    def product(tensors: list[Any]) -> Tensor:
        """Of the means of A and of B."""
        means = [torch.stack([one[Key(module, GLOBAL, factor)] for one in tensors]).mean(0) for factor in (B, A)]
        return means[0] @ means[1]

    torch.testing.assert_close(product(uploads), b @ a, rtol=1e-4, atol=1e-5)
    assert float((product(plain) - b @ a).norm() / (b @ a).norm()) > 0.3
