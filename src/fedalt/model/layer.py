"""The adapted linear layer: K clients' LoRAs, and their mixer, on one frozen base layer.

    x ─┬─ base_layer ───────────────────────────────────────────────┬─ y      W0 x + s · Σ_i α_i(x) B_i A_i x̃
       ├─ dropout ── x̃ ── [A_individual; A_row] ─┐                   │
       └─ mixer G ── softmax ── α ───────────────┴─ α·h ── [B, B] ───┘

Shapes: k clients, n rows (grouped by client), t tokens, r the ranks of all slots added up, m slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedalt.errors import UserError
from fedalt.model.rowmap import RowContext
from fedalt.names import MIXER, A, B, G, Key


@dataclass(frozen=True)
class Placement:
    """What a layer holds for one cohort.

    Attributes:
        slots: Names of the LoRAs, in the order of the mixer's rows.
        mixed: Whether a softmax mixer weighs the slots per token; otherwise they are added up.
        scale: s = alpha/r, on every slot.
        dropout: Probability of dropping an input of A in training.
    """

    slots: tuple[str, ...]
    mixed: bool
    scale: float
    dropout: float


class AdaptedLinear(nn.Module):
    """A frozen linear layer with K clients' adapters beside it (FedALT §3).

        y = W0 x + s · Σ_i α_i(x) B_i A_i drop(x),   α(x) = softmax(G x) per token, in fp32

    One dropout mask serves all slots and the mixer sees x undropped, as in the official code. Without a mixer the
    slots are added up (α ≡ 1). Works over anything that maps ``[…, d_in]`` to ``[…, d_out]``: ``nn.Linear``, GPT-2's
    ``Conv1D``, and quantised linears, whose packed weight is never looked at.
    """

    def __init__(self, base_layer: nn.Module, path: str, index: int, context: RowContext) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = path
        self.index = index
        self.context = context
        self.in_features, self.out_features = features(base_layer)
        self.placement: Placement | None = None

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, for code that asks a linear layer for it."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    def place(self, placement: Placement, tensors: Mapping[Key, Tensor], trainable: Sequence[Key]) -> None:
        """Take over the stacked tensors of a cohort: parameters where trainable, buffers (no gradient) elsewhere."""
        self.clear()
        self.placement = placement
        for key, value in tensors.items():
            name = f"{key.slot}_{key.factor}"
            if key in trainable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value, persistent=False)

    def clear(self) -> None:
        """Drop all adapters; the layer is the base layer again."""
        for names in (self._parameters, self._buffers):
            names.clear()
        self.placement = None

    def factor(self, slot: str, factor: str) -> Tensor:
        """The stacked tensor of one slot: A ``[k, r, d_in]``, B ``[k, d_out, r]`` or the mixer's G ``[k, m, d_in]``."""
        return getattr(self, f"{slot}_{factor}")  # type: ignore[no-any-return]

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """Base output plus the adapters of whichever client owns each row."""
        y: Tensor = self.base_layer(x)
        if self.placement is None:
            return y
        rows = self.context.current
        n = x.shape[0] if x.dim() == 3 else sum(rows.sizes)
        delta = self.delta(x.reshape(n, -1, self.in_features).to(self.factor(self.placement.slots[0], A).dtype))
        return y + delta.to(y.dtype).view(y.shape)

    def delta(self, x: Float[Tensor, "n t d_in"]) -> Float[Tensor, "n t d_out"]:
        """S · Σ_i α_i(x) B_i A_i drop(x)."""
        assert self.placement is not None
        rows, slots = self.context.current, self.placement.slots
        dropped = rows.dropout(x, self.placement.dropout, self.index) if self.drops else x
        a = torch.cat([self.factor(slot, A) for slot in slots], dim=1)  # [k, r, d_in]
        b = torch.cat([self.factor(slot, B) for slot in slots], dim=2)  # [k, d_out, r]
        h = rows.per_client_matmul(dropped, a) * self.placement.scale  # [n, t, r]
        if self.placement.mixed:
            h = h * self.spread(self.mix(x))
        return rows.per_client_matmul(h, b)

    @property
    def drops(self) -> bool:
        """Whether this forward applies dropout."""
        assert self.placement is not None
        return self.training and self.placement.dropout > 0 and bool(self.context.current.keys)

    def mix(self, x: Float[Tensor, "n t d_in"]) -> Float[Tensor, "n t m"]:
        """α(x) = softmax(G x) over the slots, per token."""
        alpha = torch.softmax(self.context.current.per_client_matmul(x, self.factor(MIXER, G)), dim=-1)
        if self.context.probe is not None:
            self.context.probe.weights[self.path] = alpha.detach()
        return alpha

    def spread(self, alpha: Float[Tensor, "n t m"]) -> Float[Tensor, "n t r"]:
        """Repeat each slot's weight over that slot's rank."""
        assert self.placement is not None
        ranks = [self.factor(slot, A).shape[1] for slot in self.placement.slots]
        return torch.cat([w.expand(*w.shape[:2], r) for w, r in zip(torch.split(alpha, 1, -1), ranks, strict=True)], -1)


def features(layer: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear-like layer, without looking at its weight."""
    for names in (("in_features", "out_features"), ("nx", "nf")):  # nn.Linear and its quantised kin; GPT-2's Conv1D
        if all(hasattr(layer, name) for name in names):
            return getattr(layer, names[0]), getattr(layer, names[1])
    raise UserError(f"{type(layer).__name__} is not a linear layer; adapters go on linear layers only")
