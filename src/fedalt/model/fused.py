"""The arithmetic of an adapted layer, for all clients at once, with its gradient written out.

Shapes: k clients, n tokens grouped by client (``counts``), m slots, R their ranks added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedalt.model.rowmap import Dropout

Counts = Sequence[int]


def per_client(x: Float[Tensor, "n i"], w: Float[Tensor, "k i o"], counts: Counts) -> Float[Tensor, "n o"]:
    """Multiply every token by the matrix of its own client: ``y[n] = x[n] · w[client of n]``."""
    if len(set(counts)) == 1:
        return torch.bmm(x.view(len(counts), -1, x.shape[1]), w).view(len(x), -1)
    y = x.new_empty(len(x), w.shape[2])
    for x_k, w_k, y_k in zip(x.split(list(counts)), w, y.split(list(counts)), strict=True):
        torch.mm(x_k, w_k, out=y_k)
    return y


def add_per_client(
    y: Float[Tensor, "n o"], x: Float[Tensor, "n i"], w: Float[Tensor, "k i o"], counts: Counts
) -> Float[Tensor, "n o"]:
    """``y + per_client(x, w)`` in one pass."""
    if len(set(counts)) == 1:
        k = len(counts)
        return torch.baddbmm(y.view(k, -1, y.shape[1]), x.view(k, -1, x.shape[1]), w).view_as(y)
    out = torch.empty_like(y)
    parts = [tensor.split(list(counts)) for tensor in (y, x, out)]
    for y_k, x_k, out_k, w_k in zip(*parts, w, strict=True):
        torch.addmm(y_k, x_k, w_k, out=out_k)
    return out


def outer_per_client(x: Float[Tensor, "n i"], y: Float[Tensor, "n o"], counts: Counts) -> Float[Tensor, "k i o"]:
    """Every client's Σ over its tokens of ``x[n] ⊗ y[n]``: the gradient of ``per_client`` to its matrices."""
    if len(set(counts)) == 1:
        k = len(counts)
        return torch.bmm(x.view(k, -1, x.shape[1]).transpose(1, 2), y.view(k, -1, y.shape[1]))
    out = x.new_empty(len(counts), x.shape[1], y.shape[1])
    for x_k, y_k, out_k in zip(x.split(list(counts)), y.split(list(counts)), out, strict=True):
        torch.mm(x_k.t(), y_k, out=out_k)
    return out


@dataclass(frozen=True)
class Adaptation:
    """What ``Adapt`` needs besides tensors that may have a gradient.

    Attributes:
        counts: Tokens per client.
        ranks: Rank of every slot.
        scale: s.
        dropout: Which inputs of A are kept, or nothing.
        weights: α where no mixer decides it; nothing where it is 1.
        detached: By slot, whether x gets no gradient through it; none when empty.
    """

    counts: Counts
    ranks: tuple[int, ...]
    scale: float
    dropout: Dropout | None
    weights: Float[Tensor, "#n m"] | None = None
    detached: tuple[bool, ...] = ()

    def drop(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """Zero what is dropped; the factor 1/(1−p) is on the narrow side of A."""
        return x if self.dropout is None else torch.where(self.dropout.kept, x, 0.0)

    @property
    def keep(self) -> float:
        """1/(1−p)."""
        return 1.0 if self.dropout is None else self.dropout.scale

    @property
    def spans(self) -> list[slice]:
        """Columns of every slot among all R."""
        starts = [sum(self.ranks[:i]) for i in range(len(self.ranks) + 1)]
        return [slice(start, end) for start, end in pairwise(starts)]

    def passed(self, u: Float[Tensor, "n R"]) -> Float[Tensor, "n R"]:
        """Zero what detached slots would pass on to x."""
        if any(self.detached):
            u = u.clone()
            for span, detached in zip(self.spans, self.detached, strict=True):
                if detached:
                    u[:, span] = 0
        return u

    def spread(self, alpha: Float[Tensor, "#n m"]) -> Float[Tensor, "#n R"]:
        """Repeat each slot's weight over that slot's rank."""
        return torch.cat([alpha[:, i : i + 1].expand(-1, rank) for i, rank in enumerate(self.ranks)], 1)


class Adapt(torch.autograd.Function):
    """``y + s Σ_i α_i(x) B_i A_i x̃``, with α = softmax(G x) per token (given, or 1, without a mixer) and x̃ = drop(x).

    Gradients, by token, for δ the gradient of the output, h = A x̃ and u = s·Bᵀδ over all slots:

        ∂B_i = s·δ (α_i h_i)ᵀ     ∂A_i = (α_i u_i) x̃ᵀ              ∂z = α ⊙ (β − α·β),  β_i = u_i·h_i
        ∂G = ∂z xᵀ                ∂x = drop(Aᵀ(α u)) + Gᵀ∂z        ∂y = δ

    Only the factors that ask for a gradient get one (a frozen row costs none). Apart from x and a byte per input for
    dropout only h and α are kept, R + m numbers a token. Not differentiable twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        how: Adaptation,
        x: Float[Tensor, "n d_in"],
        y: Float[Tensor, "n d_out"],
        g: Float[Tensor, "k m d_in"] | None,
        *factors: Tensor,
    ) -> tuple[Float[Tensor, "n d_out"], Float[Tensor, "n m"] | None]:
        """Args after g: A ``[k, r, d_in]`` of every slot, then B ``[k, d_out, r]`` of every slot."""
        a, b = _stack(factors)
        inner = x.to(a.dtype)
        h = per_client(how.drop(inner), a.transpose(1, 2), how.counts).mul_(how.keep)
        alpha = how.weights if g is None else torch.softmax(per_client(inner, g.transpose(1, 2), how.counts), dim=-1)
        weighted = (h if alpha is None else h * how.spread(alpha)) * how.scale
        ctx.how = how
        ctx.save_for_backward(x, g, h, alpha, *factors)
        if alpha is not None:
            ctx.mark_non_differentiable(alpha)
        if y.dtype == weighted.dtype:
            return add_per_client(y, weighted, b.transpose(1, 2), how.counts), alpha
        return y + per_client(weighted, b.transpose(1, 2), how.counts).to(y.dtype), alpha

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "n d_out"], _: Any) -> tuple[Tensor | None, ...]:
        """The formulas above."""
        x, g, h, alpha, *factors = ctx.saved_tensors
        how: Adaptation = ctx.how
        needs: Sequence[bool] = ctx.needs_input_grad[4:]
        a, b = _stack(factors)
        delta, inner = grad.to(a.dtype), x.to(a.dtype)
        dropped = how.drop(inner)
        u = per_client(delta, b, how.counts) * how.scale
        spread = None if alpha is None else how.spread(alpha)
        wu, wh = (u * how.keep, h) if spread is None else (u * spread * how.keep, h * spread)
        grads: list[Tensor | None] = [None] * len(needs)
        for i, span in enumerate(how.spans):
            if needs[i]:
                grads[i] = outer_per_client(wu[:, span].contiguous(), dropped, how.counts)
            if needs[len(how.ranks) + i]:
                grads[len(how.ranks) + i] = outer_per_client(delta, wh[:, span] * how.scale, how.counts)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = how.drop(per_client(how.passed(wu), a, how.counts))
        dg = None
        if g is not None:
            beta = torch.stack([(u[:, s] * h[:, s]).sum(1) for s in how.spans], 1)
            dz = alpha * (beta - (alpha * beta).sum(1, keepdim=True))
            dg = outer_per_client(dz, inner, how.counts) if ctx.needs_input_grad[3] else None
            dx = add_per_client(dx, dz, g, how.counts) if dx is not None else None
        return None, None if dx is None else dx.to(x.dtype), grad, dg, *grads


def _stack(factors: Sequence[Tensor]) -> tuple[Float[Tensor, "k R d_in"], Float[Tensor, "k d_out R"]]:
    m = len(factors) // 2
    return torch.cat(tuple(factors[:m]), 1), torch.cat(tuple(factors[m:]), 2)
