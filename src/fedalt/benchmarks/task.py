"""What is measured: one spec per side, what a side hands back, and which sides there are."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from fedalt.errors import UserError, choose, did_you_mean

OURS = "fedalt"


@dataclass(frozen=True)
class Spec:
    """One side of a comparison, in full: the same spec does the same work in any process.

    Attributes:
        model: Shape with random weights, ``tiny`` for the shipped base, or a model folder.
        data: ``tinyworld`` or a data folder.
        clients: Clients K; a federation with fewer lends the others further windows of its rows.
        rows: Training rows per client; for ``evaluation``, prompts per client.
        dtype: dtype of the frozen base; adapters are always fp32.
        threads: Threads of torch, or its own choice.
        cohort: Clients that fedalt stacks at a time, or its own choice.
        among: For one client, how many there are of whom it is the one with the largest step; the first when not given.
        num_beams, max_new_tokens: Of generation.
        parameters: Least parameters of an upload, for ``aggregation``; those of the usual rank when not given.
        seed: Of random weights, adapters and row order.
    """

    what: str = "round"
    side: str = OURS
    model: str = "llama-25m"
    data: str = "tinyworld"
    clients: int = 8
    rows: int = 32
    batch_size: int = 8
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: int | None = None
    cohort: int | None = None
    among: int | None = None
    dropout: float = 0.05
    num_beams: int = 1
    max_new_tokens: int = 32
    parameters: int | None = None
    seed: int = 0

    def to_json(self) -> str:
        """The spec as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """Invert ``to_json``."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"spec: broken JSON ({error.msg})") from None
        known = [f.name for f in fields(cls)]
        for name in values if isinstance(values, dict) else [""]:
            if name not in known:
                raise UserError(f'spec: unknown key "{name}"{did_you_mean(name, known)}; known: {", ".join(known)}')
        return cls(**values)


@dataclass(frozen=True)
class Outcome:
    """What a side did, so that both can be shown to have done the same.

    Attributes:
        units: What the seconds are divided by: steps, or clients times rounds.
        tokens: Tokens of the rows that were trained on, prompts included and padding not; 0 where none were.
        values: Numbers that must agree on both sides: losses, norms.
        answers: Digests of answers that must agree on both sides.
        scale: Whole work over the part that was done; above 1, time is extrapolated.
        seconds: Where the side has a better clock than the one around it.
        memory: Peak memory in bytes, where it is another process that does the work.
        more_memory: Bytes that the part which was not done would have taken on top.
    """

    units: float = 1
    tokens: int = 0
    values: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    scale: float = 1
    seconds: float | None = None
    memory: dict[str, int] | None = None
    more_memory: int = 0


@dataclass(frozen=True)
class Job:
    """A side that is ready: ``warm_up`` takes one step before the clock starts, ``work`` is timed."""

    warm_up: Callable[[], Any]
    work: Callable[[], Outcome]


@dataclass(frozen=True)
class What:
    """One comparison.

    Attributes:
        unit: What one second is spent on.
        clients, rows, model: Defaults.
        many: Whether K may be a list, for a line each.
        ours: Job of fedalt's side, as ``side.job``.
        opponents: Other side → its job; the first one is the default.
    """

    unit: str
    clients: int
    rows: int
    model: str
    many: bool
    ours: str
    opponents: dict[str, str]

    def job(self, side: str) -> str:
        """``side.job``: function ``prepare_job`` of the module ``side_side`` gets a side's work ready."""
        return self.ours if side == OURS else self.opponents[side]


_ROUND = {"paper": "paper.round", "peft": "peft.round", "flower": "flower.round", "loop": "fedalt.round"}

_RANDOM, _REAL = "llama-25m", "tiny"

WHATS = {
    "round": What("a round", 8, 32, _RANDOM, True, "fedalt.round", _ROUND),
    "step": What("a step", 1, 64, _RANDOM, False, "fedalt.round", {"peft": "peft.step", "peft-forward": "peft.step"}),
    "evaluation": What("all answers", 8, 64, _REAL, False, "fedalt.evaluation", {"paper": "paper.evaluation"}),
    "aggregation": What("an aggregation", 100, 1, _RANDOM, True, "fedalt.aggregation", {"paper": "paper.aggregation"}),
    "clients": What("a client and round", 1000, 16, _REAL, False, "command.clients", {"eight": "command.clients"}),
    "memory": What("a round", 8, 32, _RANDOM, True, "fedalt.round", {"one": "fedalt.round"}),
    "start": What("a start", 8, 16, _REAL, False, "command.start", {"transformers": "command.transformers"}),
}
"""Everything that can be measured. ``eight`` is fedalt itself with eight clients, ``one`` with the largest one."""

_FEWER = {"eight": 8, "one": 1}


def pair(spec: Spec, against: str | None = None, loop: bool = False) -> tuple[Spec, Spec]:
    """The two sides of one comparison."""
    choose("WHAT", spec.what, WHATS)
    what = WHATS[spec.what]
    side = against or next(iter(what.opponents))
    choose(f"--against for {spec.what}", side, what.opponents)
    require(side)
    if loop and spec.what != "round":
        raise UserError(f"--executor loop: only round has it, {spec.what} has not")
    if spec.parameters and spec.what != "aggregation":
        raise UserError(f"--parameters {spec.parameters}: only aggregation has it, {spec.what} has not")
    ours = replace(spec, side="loop" if loop else OURS)
    among = spec.clients if side == "one" else None
    return ours, replace(spec, side=side, clients=_FEWER.get(side, spec.clients), among=among)


def require(side: str) -> None:
    """Make sure that what a side runs on is installed."""
    if side == "flower" and not all(importlib.util.find_spec(name) for name in ("flwr", "ray")):
        raise UserError("--against flower: Flower's simulation is not installed; pip install 'flwr[simulation]'")
