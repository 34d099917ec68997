"""The adapted linear layer: K clients' LoRAs, and their mixer, on one frozen base layer.

    x ─┬─ base_layer ───────────────────────────────────────────────┬─ y      W0 x + s · Σ_i α_i(x) B_i A_i x̃
       ├─ dropout ── x̃ ── [A_individual; A_row] ─┐                   │
       └─ mixer G, c ─ softmax ── α ───────────────┴─ α·h ── [B, B] ───┘

Shapes: k clients, n tokens (grouped by client), r the ranks of all slots added up, m slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedalt.errors import UserError
from fedalt.model.batch_layout import BatchContext, Dropout
from fedalt.model.fast.fused import Adapt, Adaptation
from fedalt.names import MERGED, MIXER, A, B, C, G, Key, R, W
from fedalt.seeding import rng


@dataclass(frozen=True)
class Mixing:
    """Weights α_i of the slots in ``y = W0 x + s · Σ_i α_i B_i A_i x̃``.

    Attributes:
        kind: ``sum`` (α ≡ 1), ``fixed`` weights, ``softmax`` of the mixer's G x per token, or ``instance``: one pair of
            weights per row of a batch, which come with the batch; without them the slots are added up.
        weights: For ``fixed``, one per slot.
        most: For ``instance``, the largest weight that similarity gives.
        target: For ``instance``, the slot that gets it.
        embed: For ``instance``, the slots under which rows are compared.
    """

    kind: Literal["sum", "fixed", "softmax", "instance"] = "sum"
    weights: tuple[float, ...] = ()
    most: float = 1.0
    target: str = ""
    embed: tuple[str, ...] = ()

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Mixing:
        """What JSON has made of a mixing."""
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists})


SUM = Mixing()
SOFTMAX = Mixing("softmax")


@dataclass(frozen=True)
class Placement:
    """What a layer holds for one cohort.

    Attributes:
        slots: Names of the LoRAs, in the order of the mixer's rows.
        mixing: How the slots are weighed.
        scale: s = alpha/r, on every slot.
        dropout: Probability of dropping an input of A in training.
        detached: Slots through which no gradient flows to what is below the layer.
        slot_dropout: Probability that a client's step in training has only one of the slots that a mixer weighs.
    """

    slots: tuple[str, ...]
    mixing: Mixing
    scale: float
    dropout: float
    detached: tuple[str, ...] = ()
    slot_dropout: float = 0.0

    @property
    def mixed(self) -> bool:
        """Whether a softmax mixer weighs the slots per token."""
        return self.mixing.kind == "softmax"

    def holds(self, key: Key) -> bool:
        """Whether a layer needs this tensor."""
        return key.slot in self.slots or key.slot == MERGED or (self.mixed and key.slot == MIXER)


class AdaptedLinear(nn.Module):
    """A frozen linear layer with K clients' adapters beside it (FedALT §3).

        y = W0 x + s · Σ_i α_i(x) B_i A_i drop(x),   α(x) = softmax(G x) per token, in fp32

    One dropout mask serves all slots and the mixer sees x undropped, as in the official code. Without a mixer the
    slots are added up (α ≡ 1). Works over anything that maps ``[…, d_in]`` to ``[…, d_out]``: ``nn.Linear``, GPT-2's
    ``Conv1D``, and quantised linears, whose packed weight is never looked at.
    """

    def __init__(self, base_layer: nn.Module, path: str, index: int, context: BatchContext) -> None:
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
        """Base output plus the adapters of whichever client owns each token."""
        y: Tensor = self.base_layer(x)
        if self.placement is None:
            return y
        slots, mixed = self.placement.slots, self.placement.mixed
        tokens = x.reshape(-1, self.in_features)
        flat = self._merged(tokens, y.reshape(-1, self.out_features))
        factors = [self.factor(slot, kind) for kind in (A, B) for slot in slots]
        bases: dict[str, Tensor | None] = dict.fromkeys(slots)
        for i, slot in enumerate(slots, len(slots)):
            if (core := getattr(self, f"{slot}_{R}", None)) is not None:
                bases[slot], factors[i] = factors[i], factors[i] @ core
        norms, rows = self.context.norms, self.context.current
        how = Adaptation(
            rows.counts(len(tokens)),
            tuple(a.shape[1] for a in factors[: len(slots)]),
            self.placement.scale,
            self._dropout(tokens),
            self._weights(tokens),
            tuple(slot in self.placement.detached for slot in slots),
            self._shift(),
            norms,
            rows.row_counts(len(tokens)) if norms else (),
            self.path,
            tuple(bases.values()),
        )
        mixer = self.factor(MIXER, G) if mixed else None
        adapted, alpha = Adapt.apply(how, tokens, flat, mixer, *factors)  # type: ignore[no-untyped-call]
        if mixed and self.context.probe is not None:
            self.context.probe.weights[self.path] = alpha.detach()
        return adapted.view(y.shape)  # type: ignore[no-any-return]

    def _merged(self, x: Float[Tensor, "n d_in"], y: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_out"]:
        """Y + s·W x where something has been merged into the base."""
        name = f"{MERGED}_{W}"
        if self.placement is None or not hasattr(self, name):
            return y
        delta = self.factor(MERGED, W)
        parts = x.to(delta.dtype).split(list(self.context.current.counts(len(x))))
        merged = torch.cat([part @ w.T for part, w in zip(parts, delta, strict=True)])
        return y + (self.placement.scale * merged).to(y.dtype)

    def _weights(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "#n m"] | None:
        """Weights that no mixer decides."""
        assert self.placement is not None
        mixing = self.placement.mixing
        if mixing.kind == "fixed":
            return torch.tensor([mixing.weights], device=x.device)
        return self.context.current.token_weights(len(x)) if mixing.kind == "instance" else None

    def _shift(self) -> Float[Tensor, "k m"] | None:
        """What is added to a mixer's logits: a correction, and in training what leaves one slot in a step."""
        assert self.placement is not None
        share, keys = self.placement.slot_dropout, self.context.current.keys
        if self.placement.mixed and self.training and share and keys:
            return alone(keys, len(self.placement.slots), share).to(self.factor(MIXER, G))
        return self.factor(MIXER, C)[:, :, 0] if self.placement.mixed and hasattr(self, f"{MIXER}_{C}") else None

    def _dropout(self, x: Float[Tensor, "n d_in"]) -> Dropout | None:
        assert self.placement is not None
        rows = self.context.current
        drops = self.training and self.placement.dropout > 0 and bool(rows.keys)
        return rows.dropout(x, self.placement.dropout, self.index) if drops else None


NEVER = -64.0
"""Logit of a slot that is left out: e⁻⁶⁴ is nothing beside 1 in fp32."""


@lru_cache(maxsize=4)
def alone(keys: tuple[int, ...], slots: int, share: float) -> Float[Tensor, "k m"]:
    """For every client's step zeros, or, with a probability of ``share``, ``NEVER`` for all slots but one.

    >>> alone((1, 2), 2, 0.0)
    tensor([[0., 0.],
            [0., 0.]])
    """
    shift = torch.zeros(len(keys), slots)
    for mine, key in zip(shift, keys, strict=True):
        kept = int(torch.rand((), generator=rng(key, "slots")) / share * slots) if share else slots
        if kept < slots:
            mine.fill_(NEVER)[kept] = 0
    return shift


def features(layer: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear-like layer, without looking at its weight."""
    for names in (("in_features", "out_features"), ("nx", "nf")):  # nn.Linear and its quantised kin; GPT-2's Conv1D
        if all(hasattr(layer, name) for name in names):
            return getattr(layer, names[0]), getattr(layer, names[1])
    raise UserError(f"{type(layer).__name__} is not a linear layer; adapters go on linear layers only")
