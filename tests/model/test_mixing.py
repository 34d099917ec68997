"""Weights that no mixer decides, detached slots and merged parts: the layer against formulas in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedalt.model.batch_layout import BatchContext, BatchLayout
from fedalt.model.layer import SUM, AdaptedLinear, Mixing, Placement
from fedalt.names import MERGED, A, B, Key, W

CLIENTS, D_IN, D_OUT, SCALE = 2, 5, 4, 1.5
RANKS = {"one": 3, "two": 2}
SIZES, LENGTHS = (2, 1), (3, 1, 2)
"""Client 0 has rows of three tokens and one, client 1 has one of two."""
OWNERS = (0, 0, 0, 0, 1, 1)


def tensors(merged: bool = False) -> dict[Key, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {Key("m", slot, A): (rank, D_IN) for slot, rank in RANKS.items()}
    shapes |= {Key("m", slot, B): (D_OUT, rank) for slot, rank in RANKS.items()}
    shapes |= {Key("m", MERGED, W): (D_OUT, D_IN)} if merged else {}
    return {key: torch.randn(CLIENTS, *size, generator=generator, dtype=torch.float64) for key, size in shapes.items()}


def layer(mixing: Mixing, detached: tuple[str, ...] = (), merged: bool = False) -> AdaptedLinear:
    torch.manual_seed(3)
    made = AdaptedLinear(nn.Linear(D_IN, D_OUT).double(), "m", 0, BatchContext())
    values = tensors(merged)
    made.place(Placement(tuple(RANKS), mixing, SCALE, 0.0, detached), values, [k for k in values if k.factor != W])
    return made


def inputs() -> Tensor:
    return torch.randn(len(OWNERS), D_IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def literal(
    x: Tensor, base: nn.Module, weights: list[tuple[float, float]], values: dict[Key, Tensor], detached: tuple[str, ...]
) -> Tensor:
    """Token by token."""
    out = []
    for token, owner, pair in zip(x, OWNERS, weights, strict=True):
        y = base(token)
        for slot, weight in zip(RANKS, pair, strict=True):
            seen = token.detach() if slot in detached else token
            y = y + SCALE * weight * (values[Key("m", slot, B)][owner] @ (values[Key("m", slot, A)][owner] @ seen))
        if Key("m", MERGED, W) in values:
            y = y + SCALE * (values[Key("m", MERGED, W)][owner] @ token)
        out.append(y)
    return torch.stack(out)


ROW_WEIGHTS = [(0.2, 0.8), (1.0, 0.0), (0.6, 0.5)]
BY_ROW = [pair for pair, length in zip(ROW_WEIGHTS, LENGTHS, strict=True) for _ in range(length)]
CASES = {
    "sum": (SUM, [(1.0, 1.0)] * 6),
    "fixed": (Mixing("fixed", (0.3, 1.2)), [(0.3, 1.2)] * 6),
    "instance": (Mixing("instance"), BY_ROW),
    "instance without weights": (Mixing("instance"), [(1.0, 1.0)] * 6),
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("detached", [(), ("two",), ("one", "two")], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients(case: str, detached: tuple[str, ...], merged: bool) -> None:
    """A detached slot's own factors have a gradient all the same: only what is below the layer has none from it."""
    mixing, weights = CASES[case]
    mine, values = layer(mixing, detached, merged), tensors(merged)
    given = torch.tensor(ROW_WEIGHTS, dtype=torch.float64) if case == "instance" else None
    x, same = inputs().requires_grad_(), inputs().requires_grad_()
    leaves = {key: value.clone().requires_grad_() for key, value in values.items()}
    with mine.context.rows(BatchLayout(SIZES, LENGTHS, packed=True, weights=given)):
        y = mine(x[None])[0]
    expected = literal(same, mine.base_layer, weights, leaves, detached)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)  # fixed weights are fp32
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype)
    y.backward(slope)
    expected.backward(slope)
    torch.testing.assert_close(x.grad, same.grad, rtol=1e-6, atol=1e-6)
    for key, leaf in leaves.items():
        if key.factor != W:
            got = mine.factor(key.slot, key.factor).grad
            torch.testing.assert_close(got, leaf.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beams", [1, 3])
def test_beams_of_a_row_have_its_weights(beams: int) -> None:
    """Every row is there ``beams`` times, one after another, each with two tokens."""
    mine = layer(Mixing("instance"))
    x = inputs()[:2].expand(3 * beams, 2, D_IN)
    with mine.context.rows(BatchLayout(SIZES, weights=torch.tensor(ROW_WEIGHTS, dtype=torch.float64))):
        y = mine(x)
    for row, pair in enumerate(ROW_WEIGHTS):
        alone = layer(Mixing("fixed", pair))
        with alone.context.rows(BatchLayout(SIZES)):
            expected = alone(x)
        torch.testing.assert_close(y[row * beams : (row + 1) * beams], expected[row * beams : (row + 1) * beams])


def test_weights_of_a_slot_reach_its_whole_rank() -> None:
    """With weight 0 a slot is not there."""
    mine, values = layer(Mixing("fixed", (0.0, 1.0))), tensors()
    with mine.context.rows(BatchLayout(SIZES, LENGTHS, packed=True)):
        y = mine(inputs()[None])[0]
    torch.testing.assert_close(y, literal(inputs(), mine.base_layer, [(0.0, 1.0)] * 6, values, ()))
