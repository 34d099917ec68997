"""The gradient that is written out, against autograd of the literal formula with the same inputs dropped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedalt.model.batch_layout import BatchContext, BatchLayout
from fedalt.model.fast import fused
from fedalt.model.layer import SOFTMAX, SUM, AdaptedLinear, Placement
from fedalt.names import INDIVIDUAL, MIXER, REST_OF_WORLD, A, B, G, Key
from support import relative

D_IN, D_OUT, R, S, P, INDEX = 24, 16, 3, 1.5, 0.3, 4
SHAPES = {
    Key("w", INDIVIDUAL, A): (R, D_IN),
    Key("w", INDIVIDUAL, B): (D_OUT, R),
    Key("w", REST_OF_WORLD, A): (R, D_IN),
    Key("w", REST_OF_WORLD, B): (D_OUT, R),
    Key("w", MIXER, G): (2, D_IN),
}
SLOTS = (INDIVIDUAL, REST_OF_WORLD)
FROZEN = [Key("w", REST_OF_WORLD, A), Key("w", REST_OF_WORLD, B)]
ROWS = {
    "one client": ((2,), (5, 4)),
    "equal counts": ((2, 1, 1), (4, 3, 7, 7)),
    "unequal counts": ((2, 1, 3), (4, 3, 5, 2, 2, 6)),
    "a client sits out": ((2, 0, 1), (4, 3, 5)),
}


def stacked(clients: int) -> dict[Key, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {key: 0.5 * torch.randn(clients, *shape, generator=generator) for key, shape in SHAPES.items()}


def literal(x: Tensor, base: nn.Linear, f: dict[Key, Tensor], rows: BatchLayout, mixed: bool, detached: bool) -> Tensor:
    """Client by client; dropout is written out, with the mask that the layer draws."""
    drop = rows.dropout(x, P, INDEX)
    out = []
    parts = (tensor.split(list(rows.client_tokens)) for tensor in (x, drop.kept))
    for k, (mine, kept) in enumerate(zip(*parts, strict=True)):
        alpha = torch.softmax(mine @ f[Key("w", MIXER, G)][k].T, -1)
        y = base(mine)
        for i, slot in enumerate(SLOTS):
            seen = mine.detach() if detached and slot == REST_OF_WORLD else mine
            branch = (seen * kept * drop.scale) @ f[Key("w", slot, A)][k].T @ f[Key("w", slot, B)][k].T
            y = y + S * (alpha[:, i : i + 1] * branch if mixed else branch)
        out.append(y)
    return torch.cat(out)


@pytest.mark.parametrize("frozen", [[], FROZEN], ids=["everything trains", "frozen row"])
@pytest.mark.parametrize("detached", [False, True], ids=["", "detached row"])
@pytest.mark.parametrize("mixed", [True, False], ids=["mixer", "sum"])
@pytest.mark.parametrize("name", ROWS)
def test_every_gradient_under_dropout_is_that_of_autograd(
    name: str, mixed: bool, detached: bool, frozen: list[Key]
) -> None:
    sizes, lengths = ROWS[name]
    rows = BatchLayout(sizes, lengths, tuple(range(11, 11 + len(sizes))), packed=True)
    torch.manual_seed(0)
    base = nn.Linear(D_IN, D_OUT).requires_grad_(False)
    tensors = {key: value for key, value in stacked(len(sizes)).items() if mixed or key.slot != MIXER}
    layer = AdaptedLinear(base, "w", INDEX, BatchContext())
    kind = Placement(SLOTS, SOFTMAX if mixed else SUM, S, P, (REST_OF_WORLD,) if detached else ())
    layer.place(kind, {key: value.clone() for key, value in tensors.items()}, [k for k in tensors if k not in frozen])
    layer.train()
    x, mine = (torch.randn(sum(lengths), D_IN, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    with layer.context.rows(rows):
        y = layer(x.requires_grad_()[None])[0]
    (y**2).sum().backward()

    leaves = {key: value.clone().requires_grad_() for key, value in stacked(len(sizes)).items()}
    expected = literal(mine.requires_grad_(), base, leaves, rows, mixed, detached)
    (expected**2).sum().backward()
    assert relative(y, expected) < 1e-5
    assert x.grad is not None and mine.grad is not None
    assert relative(x.grad, mine.grad) < 1e-5
    for key in tensors:
        grad = layer.factor(key.slot, key.factor).grad
        if key in frozen:
            assert grad is None
        else:
            assert grad is not None and leaves[key].grad is not None
            assert relative(grad, leaves[key].grad) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [(8, 8), (8, 4), (16, 2)], ids=str)
@pytest.mark.parametrize("sizes", [(2, 1, 3), (2, 0, 1), (1, 0, 0), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("length", [1, 5])
def test_in_bf16_as_on_a_gpu_everything_is_near_fp32(
    ranks: tuple[int, int], sizes: tuple[int, ...], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dtypes and the kernel of a GPU, on the CPU."""
    generator = torch.Generator().manual_seed(4)
    rows = BatchLayout(sizes, (length,) * sum(sizes), packed=True)
    tensors = {
        key: (0.5 * torch.randn(len(sizes), *shape, generator=generator)).bfloat16().float()
        for slot, r in zip(SLOTS, ranks, strict=True)
        for key, shape in ((Key("w", slot, A), (r, D_IN)), (Key("w", slot, B), (D_OUT, r)))
    } | {Key("w", MIXER, G): torch.randn(len(sizes), 2, D_IN, generator=generator).bfloat16().float()}
    drawn = torch.randn(length * sum(sizes), D_IN, generator=generator).bfloat16()
    base = nn.Linear(D_IN, D_OUT).requires_grad_(False).bfloat16()
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.bfloat16:
            monkeypatch.setattr(fused.Adaptation, "working", lambda how, x, factor: x.dtype)
            monkeypatch.setattr(fused, "_joins", lambda x: True)
        layer = AdaptedLinear(base.to(dtype), "w", INDEX, BatchContext())
        layer.place(Placement(SLOTS, SOFTMAX, S, 0.0), {k: v.clone() for k, v in tensors.items()}, list(tensors))
        x = drawn.to(dtype).requires_grad_()
        with layer.context.rows(rows):
            y = layer(x[None])[0]
        y.sum().backward()
        assert y.dtype == dtype
        grads = [layer.factor(key.slot, key.factor).grad for key in tensors]
        assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)
        found.append([y.detach(), x.grad, *grads])
    for exact, half in zip(*found, strict=True):
        assert exact is not None and half is not None
        assert float((half.float() - exact).norm()) < 0.03 * float(exact.norm())


def test_a_frozen_row_costs_no_product_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product over all tokens for A, B and the mixer each; two more for a row only where it trains."""
    calls: list[int] = []
    own = fused.outer_per_client

    def counted(*arguments: object) -> Tensor:
        calls.append(1)
        return own(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fused, "outer_per_client", counted)
    found = []
    for frozen in (FROZEN, []):
        layer = AdaptedLinear(nn.Linear(D_IN, D_OUT).requires_grad_(False), "w", INDEX, BatchContext())
        layer.place(Placement(SLOTS, SOFTMAX, S, 0.0), stacked(2), [key for key in SHAPES if key not in frozen])
        calls.clear()
        with layer.context.rows(BatchLayout((1, 2))):
            layer(torch.ones(3, 4, D_IN)).sum().backward()
        found.append(len(calls))
    assert found == [3, 5]
