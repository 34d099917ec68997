"""Which client each row of a batch belongs to: the one thing every adapted layer must know.

A batch holds the rows of client 0, then those of client 1, and so on. ``sizes`` says how many each client has (zero
for a client that sits this batch out). ``generate`` expands every row into its beams contiguously, and some models
flatten rows and tokens before a linear layer; both keep the blocks in order, so the expansion follows from the
number of rows a layer actually sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from fedalt.seeding import derive_seed


@dataclass(frozen=True)
class RowMap:
    """The rows of one batch.

    Attributes:
        sizes: Rows per client, in stack order.
        lengths: Longest row of each client in tokens, before padding to the batch; needed with dropout only.
        keys: One dropout seed per client; empty means no dropout.
    """

    sizes: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()

    def per_client_matmul(self, x: Float[Tensor, "n t i"], w: Float[Tensor, "k o i"]) -> Float[Tensor, "n t o"]:
        """Multiply every row by the matrix of its own client: ``y[n] = x[n] · w[client of n]ᵀ``."""
        n, _, d = x.shape
        if len(set(self.sizes)) == 1:
            y = torch.bmm(x.reshape(len(self.sizes), -1, d), w.transpose(1, 2))  # [k, n/k·t, o]
            return y.view(n, -1, w.shape[1])
        return torch.bmm(x, w[self.owners(n, x.device)].transpose(1, 2))  # [n, t, o]

    def owners(self, rows: int, device: torch.device) -> Tensor:
        """Stack index of the client of each of ``rows`` rows (a multiple of the batch when rows are expanded)."""
        expansion = rows // sum(self.sizes)
        counts = torch.tensor([size * expansion for size in self.sizes], device=device)
        return torch.repeat_interleave(torch.arange(len(self.sizes), device=device), counts, output_size=rows)

    def dropout(self, x: Float[Tensor, "n t d"], p: float, layer: int) -> Float[Tensor, "n t d"]:
        """Drop inputs with a mask that depends on the client, its step and the layer, never on who else is present.

        The mask is drawn from a seed and not from a stream, so a recompute under gradient checkpointing draws the same.
        """
        mask = torch.zeros_like(x)
        generator = torch.Generator(x.device)
        start = 0
        for size, length, key in zip(self.sizes, self.lengths, self.keys, strict=True):
            generator.manual_seed(derive_seed(key, layer))
            draw = torch.empty(size, length, x.shape[2], device=x.device).bernoulli_(1 - p, generator=generator)
            mask[start : start + size, :length] = draw
            start += size
        return x * mask.div_(1 - p)


@dataclass
class MixerProbe:
    """Collects the mixer weights of every layer while it is attached.

    Attributes:
        weights: Module path → softmax weights ``[rows, tokens, slots]`` of the latest forward.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)


class RowContext:
    """The object that all adapted layers of one model hold: the current row map, and a probe when somebody looks."""

    def __init__(self) -> None:
        self.current = RowMap((1,))
        self.probe: MixerProbe | None = None

    @contextmanager
    def rows(self, rows: RowMap, probe: MixerProbe | None = None) -> Iterator[None]:
        """Run the enclosed forward passes with this row map."""
        before = (self.current, self.probe)
        self.current, self.probe = rows, probe
        try:
            yield
        finally:
            self.current, self.probe = before

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts for ``torch.utils.checkpoint``: the recompute sees the row map of its own forward."""
        return nullcontext(), self.rows(self.current)
