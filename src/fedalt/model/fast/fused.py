"""The arithmetic of an adapted layer, for all clients at once, with its gradient written out.

Shapes: k clients, n tokens grouped by client (``counts``), m slots, R their ranks added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from jaxtyping import Float, Int
from torch import Tensor

from fedalt.model.batch_layout import Dropout, RowNorms

Counts = Sequence[int]


def per_client(x: Float[Tensor, "n i"], w: Float[Tensor, "k i o"], counts: Counts) -> Float[Tensor, "n o"]:
    """Multiply every token by the matrix of its own client: ``y[n] = x[n] · w[client of n]``."""
    if len(set(counts)) == 1:
        return torch.bmm(x.view(len(counts), -1, x.shape[1]), w).view(len(x), -1)
    if _joins(x):
        return joint(x, w, counts)
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
    if _joins(x):
        return y + joint(x, w, counts)
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
    if _joins(x):
        return joint_outer(x, y, counts)
    out = x.new_empty(len(counts), x.shape[1], y.shape[1])
    for x_k, y_k, out_k in zip(x.split(list(counts)), y.split(list(counts)), out, strict=True):
        torch.mm(x_k.t(), y_k, out=out_k)
    return out


def joint(x: Float[Tensor, "n i"], w: Float[Tensor, "k i o"], counts: Counts) -> Float[Tensor, "n o"]:
    """``per_client`` in one call."""
    y = F.grouped_mm(_padded(x), _padded(_padded(w, 1)), offs=_ends(tuple(counts), x.device))
    return y[:, : w.shape[2]]


def joint_outer(x: Float[Tensor, "n i"], y: Float[Tensor, "n o"], counts: Counts) -> Float[Tensor, "k i o"]:
    """``outer_per_client`` in one call; clients without tokens get zeros, which torch leaves to the card."""
    out = F.grouped_mm(_padded(x).t(), _padded(y), offs=_ends(tuple(counts), x.device))
    for mine, count in zip(out, counts, strict=True):
        if not count:
            mine.zero_()
    return out[:, : x.shape[1], : y.shape[1]]


def _joins(x: Tensor) -> bool:
    """Whether torch has a kernel for groups of unequal size: bf16 on Hopper and on Blackwell for data centres.

    On other cards it is a loop that asks the card for the sizes first, each time.
    """
    return x.is_cuda and x.dtype == torch.bfloat16 and _generation(x.device) in (9, 10)


@lru_cache(maxsize=64)
def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _padded(x: Tensor, dim: int = -1) -> Tensor:
    """Zeros up to a multiple of eight numbers: the kernel wants rows that start at 16 bytes."""
    lacking = -x.shape[dim] % 8
    return F.pad(x, (0, lacking) if dim == -1 else (0, 0, 0, lacking)) if lacking else x


@lru_cache(maxsize=64)
def _ends(counts: tuple[int, ...], device: torch.device) -> Int[Tensor, " k"]:
    """Where each client's tokens end; the same for all layers of a step."""
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Adaptation:
    """What ``Adapt`` needs besides tensors that may have a gradient.

    Attributes:
        counts: Tokens per client.
        dropout: Which inputs of A are kept, or None.
        weights: α where no mixer decides it; None where it is 1.
        detached: By slot, whether x gets no gradient through it; none when empty.
        shift: What is added to the mixer's logits, per client.
        norms: Where gradients of single rows are measured, if they are.
        rows: Tokens per row, for that.
        path: The layer's, for that.
        bases: By slot, B of a LoRA B R A whose core trains, for that; the B that it is given here is B R.
    """

    counts: Counts
    ranks: tuple[int, ...]
    scale: float
    dropout: Dropout | None
    weights: Float[Tensor, "#n m"] | None = None
    detached: tuple[bool, ...] = ()
    shift: Float[Tensor, "k m"] | None = None
    norms: RowNorms | None = None
    rows: Counts = ()
    path: str = ""
    bases: Sequence[Float[Tensor, "k d_out r"] | None] = ()

    def gradient(
        self, name: str, x: Float[Tensor, "n i"], y: Float[Tensor, "n o"], dtype: torch.dtype
    ) -> Tensor | None:
        """Σ x ⊗ y of every client; where norms are asked for, of every row, to be measured and forgotten."""
        if self.norms is None or not self.norms.asked:
            return outer_per_client(x, y, self.counts).to(dtype)
        self.norms.add(f"{self.path} {name}", outer_per_client(x, y, self.rows))
        return None

    def inward(self, slot: int, delta: Float[Tensor, "n d_out"]) -> Float[Tensor, "n o"]:
        """δ, but B⁰ᵀδ where a row's gradient to a core is measured."""
        basis = self.bases[slot] if self.norms is not None and self.norms.asked and self.bases else None
        return delta if basis is None else per_client(delta, basis, self.counts)

    def working(self, x: Tensor, factor: Tensor) -> torch.dtype:
        """What the long products are computed in."""
        half = x.is_cuda and x.dtype == torch.bfloat16 and self.norms is None  # a clipped sum may not be rounded
        return x.dtype if half else factor.dtype

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
        return alpha.index_select(1, _slots(self.ranks, alpha.device))

    def gathered(self, x: Float[Tensor, "n R"]) -> Float[Tensor, "n m"]:
        """Add up what belongs to each slot."""
        if len(set(self.ranks)) == 1:
            return x.view(len(x), len(self.ranks), -1).sum(2)
        return torch.stack([x[:, span].sum(1) for span in self.spans], 1)


@lru_cache(maxsize=64)
def _slots(ranks: tuple[int, ...], device: torch.device) -> Int[Tensor, " R"]:
    """Slot of every column."""
    return torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks)).to(device)


class Adapt(torch.autograd.Function):
    """``y + s Σ_i α_i(x) B_i A_i x̃``, with α = softmax(G x + c) per token (given, or 1, without a mixer), x̃ = drop(x).

    Gradients, by token, for δ the gradient of the output, h = A x̃ and u = s·Bᵀδ over all slots:

        ∂B_i = s·δ (α_i h_i)ᵀ     ∂A_i = (α_i u_i) x̃ᵀ              ∂z = α ⊙ (β − α·β),  β_i = u_i·h_i
        ∂G = ∂z xᵀ                ∂x = drop(Aᵀ(α u)) + Gᵀ∂z        ∂y = δ

    Only the factors that ask for a gradient get one (a frozen row costs none). Apart from x and a byte per input for
    dropout only h and α are kept, R + m numbers a token. Not differentiable twice.

    Everything is in the factors' own dtype, fp32, with one exception: on a GPU, the products with a bf16 base's tokens
    are in bf16, each rounded to it, as under autocast. Sums and the softmax of what comes out of them (h, α, u, β) are
    fp32, and gradients are kept in fp32.
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
        full, working = factors[0].dtype, how.working(x, factors[0])
        a, b = _stack(factors, working)
        inner = x.to(working)
        h = per_client(how.drop(inner), a.transpose(1, 2), how.counts).to(full).mul_(how.keep)
        alpha = how.weights
        if g is not None:
            z = per_client(inner, g.to(working).transpose(1, 2), how.counts).to(full)
            if how.shift is not None:
                z += how.shift.repeat_interleave(torch.tensor(how.counts, device=z.device), 0)
            alpha = torch.softmax(z, dim=-1)
        weighted = ((h if alpha is None else h * how.spread(alpha)) * how.scale).to(working)
        ctx.how = how
        ctx.save_for_backward(x, g, h, alpha, *factors)
        if alpha is not None:
            ctx.mark_non_differentiable(alpha)
        if y.dtype == working:
            return add_per_client(y, weighted, b.transpose(1, 2), how.counts), alpha
        return y + per_client(weighted, b.transpose(1, 2), how.counts).to(y.dtype), alpha

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "n d_out"], _: Any) -> tuple[Tensor | None, ...]:
        """The formulas above."""
        x, g, h, alpha, *factors = ctx.saved_tensors
        how: Adaptation = ctx.how
        full, working = factors[0].dtype, how.working(x, factors[0])
        a, b = _stack(factors, working)
        needs: Sequence[bool] = ctx.needs_input_grad[4:]
        delta, inner = grad.to(working), x.to(working)
        dropped = how.drop(inner)
        u = per_client(delta, b, how.counts).to(full) * how.scale
        spread = None if alpha is None else how.spread(alpha)
        wu, wh = (u * how.keep, h) if spread is None else (u * spread * how.keep, h * spread)
        below = wu.to(working)
        grads: list[Tensor | None] = [None] * len(needs)
        for i, span in enumerate(how.spans):
            if needs[i]:
                grads[i] = how.gradient(f"A {i}", _rows(below[:, span]), dropped, full)
            if needs[len(how.ranks) + i]:
                seen = (wh[:, span] * how.scale).to(working)
                grads[len(how.ranks) + i] = how.gradient(f"B {i}", how.inward(i, delta), seen, full)
        dx = None
        if ctx.needs_input_grad[1]:
            dx = how.drop(per_client(how.passed(below), a, how.counts))
        dg = None
        if g is not None:
            beta = how.gathered(u * h)
            dz = (alpha * (beta - (alpha * beta).sum(1, keepdim=True))).to(working)
            dg = how.gradient("G", dz, inner, full) if ctx.needs_input_grad[3] else None
            dx = add_per_client(dx, dz, g.to(working), how.counts) if dx is not None else None
        return None, None if dx is None else dx.to(x.dtype), grad, dg, *grads


def _rows(x: Float[Tensor, "n r"]) -> Float[Tensor, "n r"]:
    """Without gaps between rows, even where there is one row only and torch sees no gap."""
    return x if x.stride(0) == x.shape[1] else x.clone(memory_format=torch.contiguous_format)


def _stack(
    factors: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Float[Tensor, "k R d_in"], Float[Tensor, "k d_out R"]]:
    m = len(factors) // 2
    return torch.cat(tuple(factors[:m]), 1).to(dtype), torch.cat(tuple(factors[m:]), 2).to(dtype)
