"""One client's adapter tensors: their shapes, their start values, stacking and unstacking, safetensors files."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from fedalt.files import write_bytes
from fedalt.names import MERGED, MIXER, A, B, G, Key, R, Tensors, W
from fedalt.seeding import rng


@dataclass(frozen=True)
class ClientState:
    """All that a client keeps between rounds. Private unless its method uploads it.

    Attributes:
        round: Last round in which the client took part, counted from 1; 0 before the first.
        tensors: Its adapters and mixer, fp32 on the CPU.
        sent: Exactly what the server last received from it, or None yet; what it subtracts from a mean.
        heads: Its classification head, fp32 on the CPU; empty for a language model.
        optimizer: What its optimiser remembers, by the name of a moment; empty where it starts anew every round.
        private_steps: Steps with noise that have been taken so far, of which ε follows.
    """

    client: int
    round: int
    tensors: Tensors
    sent: Tensors | None = None
    heads: Tensors = field(default_factory=dict)
    optimizer: Mapping[str, Tensors] = field(default_factory=dict)
    private_steps: int = 0

    def with_tensors(self, changes: Tensors, heads: Tensors | None = None) -> ClientState:
        """The same state with some adapter tensors, and some of the head's, replaced."""
        return replace(self, tensors={**self.tensors, **changes}, heads={**self.heads, **(heads or {})})


@dataclass(frozen=True)
class AdapterShape:
    """The adapters of a client of one run.

    Attributes:
        ranks: Rank of every slot, in the order of the mixer's rows.
        mixed: Whether each layer has a softmax mixer G ``[m, d_in]``.
        layers: Module path → (d_in, d_out).
        merged: Whether each layer has a dense W ``[d_out, d_in]`` for what is merged into the base.
        core: Whether each LoRA has an R ``[r, r]`` between A and B, which starts at zero in B's place.
    """

    ranks: Mapping[str, int]
    mixed: bool
    layers: Mapping[str, tuple[int, int]]
    merged: bool = False
    core: bool = False

    @property
    def slots(self) -> tuple[str, ...]:
        """Slot names."""
        return tuple(self.ranks)

    def size(self, keys: Sequence[Key] | None = None) -> int:
        """Number of parameters behind some keys, or behind all."""
        shapes = self.shapes()
        return sum(shapes[key][0] * shapes[key][1] for key in (shapes if keys is None else keys))

    def shapes(self) -> dict[Key, tuple[int, int]]:
        """Every key of a client and its shape."""
        shapes: dict[Key, tuple[int, int]] = {}
        for path, (d_in, d_out) in self.layers.items():
            for slot, rank in self.ranks.items():
                shapes[Key(path, slot, A)] = (rank, d_in)
                shapes[Key(path, slot, B)] = (d_out, rank)
                if self.core:
                    shapes[Key(path, slot, R)] = (rank, rank)
            if self.mixed:
                shapes[Key(path, MIXER, G)] = (len(self.ranks), d_in)
            if self.merged:
                shapes[Key(path, MERGED, W)] = (d_out, d_in)
        return shapes


def start_group(init: Literal["shared", "code_like", "per_client"], client: int) -> int:
    """Clients of a group start alike."""
    return {"shared": 0, "code_like": min(client, 1), "per_client": client}[init]


def drawn(rows: int, columns: int, generator: torch.Generator, normal: int | None = None) -> torch.Tensor:
    """U(−1/√columns, 1/√columns), or N(0, 1/r²) for a rank that is given as ``normal``."""
    if normal is not None:
        return torch.randn(rows, columns, generator=generator) / normal
    draw = torch.rand(rows, columns, generator=generator)
    return (2 * draw - 1) / float(columns**0.5)


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Orthonormal columns; their signs are fixed, so that all machines draw the same up to rounding."""
    q, r = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))
    signed: torch.Tensor = q * r.diagonal().sign()
    return signed.float()


def initial_state(
    shape: AdapterShape,
    client: int,
    seed: int,
    init: Literal["shared", "code_like", "per_client"],
    mixer_init: Literal["kaiming", "zeros"],
    *,
    frozen: Sequence[str] = (),
    rank: int | None = None,
    distribution: Literal["uniform", "gaussian"] = "uniform",
) -> ClientState:
    """Start values: A and G kaiming-uniform, that is U(−1/√d_in, 1/√d_in), and B zero, as in PEFT and the paper's code.

    A is normal of standard deviation 1/r with the distribution ``gaussian``, as PEFT has it.

    ``shared`` gives every client the same A and G; ``code_like`` is what the official code does by a side effect of
    its seeding (client 0 differs, all others are equal); ``per_client`` gives everybody its own, which makes factor
    means nearly orthogonal to every client's A. Frozen slots (the row) start at zero: nobody has uploaded yet. A client
    of a lower ``rank`` than its slots have has zeros beyond it, which never get a gradient.
    """
    group = start_group(init, client)
    tensors = {}
    for key, (rows, columns) in shape.shapes().items():
        basis = shape.core and key.factor == B
        zero = key.factor in (B, W, R) and not basis
        zero |= key.slot in frozen or (key.slot == MIXER and mixer_init == "zeros")
        place = shape.slots.index(key.slot) if key.slot in shape.slots else MIXER  # not its name: methods start alike
        own = rng(seed, "init", group, key.module, place, key.factor)
        normal = (rank or rows) if distribution == "gaussian" and key.factor == A else None
        random = orthonormal(rows, columns, own) if basis else drawn(rows, columns, own, normal)
        tensors[key] = torch.zeros(rows, columns) if zero else random
        if key.factor == A and rank is not None:
            tensors[key][rank:] = 0
    return ClientState(client, 0, tensors)


_OPTIMIZER = "optimizer-"


def save_state(state: ClientState, path: Path) -> None:
    """Write a state as one safetensors file, atomically."""
    tensors = {f"own.{key}": value.contiguous() for key, value in state.tensors.items()}
    tensors |= {f"sent.{key}": value.clone() for key, value in (state.sent or {}).items()}
    tensors |= {f"head.{key}": value.contiguous() for key, value in state.heads.items()}
    for name, part in state.optimizer.items():
        tensors |= {f"{_OPTIMIZER}{name}.{key}": value.contiguous() for key, value in part.items()}
    header = {"client": state.client, "round": state.round, "has_sent": state.sent is not None}
    header |= {"private_steps": state.private_steps} if state.private_steps else {}
    write_bytes(path, save(tensors, metadata={"fedalt": json.dumps(header)}))


def load_state(path: Path) -> ClientState:
    """Map what ``save_state`` wrote into memory; numbers are read when they are used."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["fedalt"])
        parts = defaultdict[str, dict[Key, torch.Tensor]](dict)
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            part, key = name.split(".", 1)
            parts[part][Key.parse(key)] = file.get_tensor(name)
    sent = parts["sent"] if header["has_sent"] else None
    optimizer = {name.removeprefix(_OPTIMIZER): part for name, part in parts.items() if name.startswith(_OPTIMIZER)}
    steps = header.get("private_steps", 0)
    return ClientState(header["client"], header["round"], parts["own"], sent, parts["head"], optimizer, steps)


def save_tensors(tensors: Tensors, path: Path) -> None:
    """Write tensors alone as one safetensors file, atomically; some of them may be the same."""
    write_bytes(
        path, save({str(key): value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()})
    )


def digest(tensors: Tensors) -> str:
    """SHA-256 of all numbers."""
    named = {str(key): value.contiguous() for key, value in sorted(tensors.items())}
    return hashlib.sha256(save(named)).hexdigest()


def load_tensors(path: Path) -> Tensors:
    """Read what ``save_tensors`` wrote."""
    return {Key.parse(name): value for name, value in load_file(path).items()}
