"""Which client each row of a batch belongs to: the one thing every adapted layer must know.

A batch holds the rows of client 0, then those of client 1, and so on. ``sizes`` says how many each client has (zero
for a client that sits this batch out). ``generate`` expands every row into its beams contiguously, and some models
flatten rows and tokens before a linear layer; both keep the blocks in order, so how many tokens each client has
follows from the number of tokens a layer actually sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fedalt.errors import UserError
from fedalt.seeding import derive_seed

_LIKE = 0.8
"""Rows of at least this share of a group's longest row join the group."""


@dataclass(frozen=True)
class Group:
    """Rows that are attended to together.

    Attributes:
        width: Slots of every row.
        padded: Whether some row is shorter than that.
        mask: True where a slot holds a token.
    """

    rows: int
    width: int
    padded: bool
    mask: Bool[Tensor, "rows 1 1 width"]


@dataclass(frozen=True)
class Layout:
    """Slots of the tokens of packed rows while they are in groups of one length.

    Attributes:
        groups: The groups, longest rows first.
        token: Token that stands in each slot; slots of padding repeat their row's last token.
        slot: Slot of each token.
        starts: First token of every row, in the rows' own order, and the number of tokens; 32-bit, as kernels want it.
    """

    groups: tuple[Group, ...]
    token: Int[Tensor, " s"]
    slot: Int[Tensor, " t"]
    starts: Int[Tensor, " rows+1"]


def layout(lengths: Sequence[int], device: torch.device) -> Layout:
    """Group rows by length, longest first."""
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups: list[Group] = []
    tokens: list[Tensor] = []
    slot = torch.empty(starts[-1], dtype=torch.long)
    used = 0
    while order:
        width = lengths[order[0]]
        mine = [row for row in order if lengths[row] >= _LIKE * width]
        order = order[len(mine) :]
        sizes = torch.tensor([lengths[row] for row in mine])
        columns = torch.arange(width).expand(len(mine), -1)
        real = columns < sizes[:, None]
        token = torch.tensor([starts[row] for row in mine])[:, None] + columns.minimum(sizes[:, None] - 1)
        slot[token[real]] = used + real.flatten().nonzero()[:, 0]
        groups.append(Group(len(mine), width, not bool(real.all()), real[:, None, None].to(device)))
        tokens.append(token.flatten())
        used += token.numel()
    ends = torch.tensor(starts, dtype=torch.int32, device=device)
    return Layout(tuple(groups), torch.cat(tokens).to(device), slot.to(device), ends)


_STEPS = 1 << 16
"""Dropout probabilities are multiples of 1/65,536: four draws from one 64-bit random number."""


@dataclass(frozen=True)
class Dropout:
    """One draw of dropout on a layer's input.

    Attributes:
        kept: False where an input is dropped.
        scale: 1/(1−p), p taken to the nearest 1/65,536.
    """

    kept: Bool[Tensor, "n d"]
    scale: float


@dataclass(frozen=True)
class BatchLayout:
    """The rows of one batch.

    Attributes:
        sizes: Rows per client, in stack order.
        lengths: Tokens of every row; needed for packed rows and for dropout only.
        keys: One dropout seed per client; empty means no dropout.
        packed: Whether the rows stand one after another as one long row, instead of padded to one length.
        wanted: Positions, the same in every row of the input, whose final states are asked for; all when not given.
        weights: Weights of the slots, row by row, for placements that mix by instance.
        part: The whole that these rows are a part of, and where their tokens stand in it; dropout is drawn for all.
    """

    sizes: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()
    packed: bool = False
    wanted: Int[Tensor, " s"] | None = None
    weights: Float[Tensor, "rows m"] | None = None
    part: tuple[BatchLayout, Int[Tensor, " t"]] | None = None

    def by_length(self) -> Iterator[tuple[Int[Tensor, " t"], BatchLayout]]:
        """The rows of each length as a batch of their own, after where their tokens stand in this one."""
        whole, places = self.part or (self, torch.arange(sum(self.lengths)))
        owners = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))
        tokens = torch.arange(sum(self.lengths)).split(list(self.lengths))
        for length in dict.fromkeys(self.lengths):
            mine = [row for row, other in enumerate(self.lengths) if other == length]
            sizes = owners[mine].bincount(minlength=len(self.sizes)).tolist()
            weights = None if self.weights is None else self.weights[mine]
            here = torch.cat([tokens[row] for row in mine])
            part = (whole, places[here])
            yield here, BatchLayout(tuple(sizes), (length,) * len(mine), self.keys, weights=weights, part=part)

    def token_weights(self, tokens: int) -> Float[Tensor, "tokens m"] | None:
        """The weights of every token's row; beams of a row have the weights of that row."""
        if self.weights is None:
            return None
        each = (
            torch.tensor(self.lengths) if self.packed else torch.full((len(self.weights),), tokens // len(self.weights))
        )
        return self.weights.repeat_interleave(each.to(self.weights.device), 0)

    def counts(self, tokens: int) -> tuple[int, ...]:
        """Tokens of every client in a layer's input of so many tokens, padding and beams included."""
        if self.packed:
            return self.client_tokens
        each = tokens // sum(self.sizes)
        return tuple(size * each for size in self.sizes)

    def row_counts(self, tokens: int) -> tuple[int, ...]:
        """Tokens of every row in a layer's input of so many tokens."""
        return self.lengths if self.packed else (tokens // sum(self.sizes),) * sum(self.sizes)

    @cached_property
    def client_tokens(self) -> tuple[int, ...]:
        """Tokens of every client, without padding."""
        starts = [sum(self.sizes[:k]) for k in range(len(self.sizes))]
        return tuple(sum(self.lengths[s : s + size]) for s, size in zip(starts, self.sizes, strict=True))

    def layout(self, device: torch.device) -> Layout:
        """How the rows are grouped for attention."""
        if device not in self._layouts:
            self._layouts[device] = layout(self.lengths, device)
        return self._layouts[device]

    @cached_property
    def _layouts(self) -> dict[torch.device, Layout]:
        return {}

    def places(self, tokens: int) -> Int[Tensor, " t"]:
        """Where the real tokens, row by row, stand in a layer's input of so many tokens; padding is on the right."""
        if self.packed:
            return torch.arange(tokens)
        width = tokens // len(self.lengths)
        return torch.cat([torch.arange(length) + row * width for row, length in enumerate(self.lengths)])

    def summaries(self, which: Literal["first", "last"]) -> Int[Tensor, " rows"]:
        """Where each row's first or last token stands among the tokens of all rows."""
        ends = torch.tensor(self.lengths).cumsum(0)
        return ends - 1 if which == "last" else ends - torch.tensor(self.lengths)

    def dropout(self, x: Float[Tensor, "n d"], p: float, layer: int) -> Dropout:
        """Which inputs of a layer are kept.

        Draws depend on the client, its step and the layer, never on who else is present or how rows are laid out. They
        come from a seed and not from a stream, so a recompute under gradient checkpointing draws the same.
        """
        whole, places = self.part or (self, None)
        own, everybody = self.client_tokens, whole.client_tokens
        if places is None and len(set(self.lengths)) == 1:  # layers may see unlike numbers of an image's tokens
            own = everybody = self.counts(len(x))
        tokens, width, first = sum(own), x.shape[1], 0
        bits = torch.empty(tokens, -(-width // 4), dtype=torch.int64, device=x.device)
        generator = torch.Generator(x.device)
        mine = [None] * len(own) if places is None else places.to(x.device).split(list(own))
        for part, at, key, count in zip(bits.split(list(own)), mine, self.keys, everybody, strict=True):
            generator.manual_seed(derive_seed(key, layer))
            every = part if at is None else part.new_empty(count, part.shape[1])
            every.random_(-(1 << 63), None, generator=generator)
            if at is not None:
                part.copy_(every[at - first])
            first += count
        dropped = round(p * _STEPS)
        kept = bits.view(torch.int16)[:, :width] >= dropped - _STEPS // 2
        if tokens < len(x):
            everywhere = kept.new_zeros(x.shape)
            kept = everywhere.index_copy_(0, self.places(len(x)).to(x.device), kept)
        return Dropout(kept, _STEPS / (_STEPS - dropped))


@dataclass
class MixerProbe:
    """Collects the mixer weights of every layer while it is attached.

    Attributes:
        weights: Module path → softmax weights ``[tokens, slots]`` of the latest forward.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)


class RowNorms:
    """How long the gradient of every row is, over everything that trains; layer by layer, none of them kept.

    Attributes:
        squares: Squared lengths so far.
        asked: Whether backward passes give these instead of gradients of adapters.
        apart: Heads with a copy for every row, whose gradients are the rows' own.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.squares = torch.zeros(rows, dtype=torch.float64, device=device)
        self.asked = True
        self.apart: list[Tensor] = []
        self._seen: set[str] = set()

    def add(self, name: str, grads: Float[Tensor, "rows ..."]) -> None:
        """Take in the gradients of one tensor."""
        if name in self._seen:
            raise UserError(f"privacy: {name} is used twice in a step, so its rows' gradients cannot be told apart")
        self._seen.add(name)
        self.squares += grads.flatten(1).double().square().sum(1)


class BatchContext:
    """The object that all adapted layers of one model hold: the current row map, and a probe when somebody looks.

    ``attention`` switches the model's attention between padded and packed rows, and returns what it was before.
    """

    def __init__(self, attention: Callable[[bool], bool] = lambda packed: False) -> None:
        self.current = BatchLayout((1,))
        self.probe: MixerProbe | None = None
        self.norms: RowNorms | None = None
        self.attention = attention
        self.windows: set[int] = set()
        """Windows that attention was asked to keep to."""

    @contextmanager
    def rows(self, rows: BatchLayout, probe: MixerProbe | None = None) -> Iterator[None]:
        """Run the enclosed forward passes with this row map."""
        before = (self.current, self.probe)
        self.current, self.probe = rows, probe
        packed = self.attention(rows.packed)
        try:
            yield
        finally:
            self.attention(packed)
            self.current, self.probe = before

    @contextmanager
    def row_norms(self, rows: int, device: torch.device) -> Iterator[RowNorms]:
        """Find every row's length of gradient in the enclosed forward and backward passes."""
        self.norms = RowNorms(rows, device)
        try:
            yield self.norms
        finally:
            self.norms = None

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts for ``torch.utils.checkpoint``: the recompute sees the row map of its own forward."""
        return nullcontext(), _Again(partial(self.rows, self.current))


class _Again(AbstractContextManager[None]):
    """A context that is entered once for every backward pass."""

    def __init__(self, made: Callable[[], AbstractContextManager[None]]) -> None:
        self._made = made

    def __enter__(self) -> None:
        self._now = self._made()
        self._now.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._now.__exit__(*error)
