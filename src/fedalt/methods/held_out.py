"""Choices on rows that no LoRA was trained on: losses row by row, and the rule of one standard error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fedalt.config.section import Section
from fedalt.data.batches import collate
from fedalt.data.encode import Example
from fedalt.methods.base import Method
from fedalt.model.adapted import AdaptedModel
from fedalt.model.layer import NEVER, Placement
from fedalt.model.state import ClientState
from fedalt.names import EVIDENCE, MIXER, B, C, E, G, Key
from fedalt.training.loss import row_losses

_ROWS = 16
"""Rows per client that are read at a time."""
_WORST = 1e9
"""Nats in place of a loss that is no number."""
Candidate = Mapping[str, float]
"""A change of a client's model, by a name of the method's own → number."""


class HeldOutSettings(Section):
    """How a method chooses on held-out rows."""

    held_out: float = Field(
        0.1, gt=0, lt=1, description="share of training rows to choose on, of clients without validation rows"
    )
    standard_errors: float = Field(1.0, ge=0, description="what counts as no difference between two losses")


class HeldOut(Method):
    """A method that makes each client's model by a choice among candidates, on rows that no phase has trained on.

    A subclass says which ``candidates`` there are, the one to fall back on first and then the nearest to it, and what
    each makes of a state. The rule of one standard error: c* has the least mean loss; chosen is the first c with

        mean_i(ℓ_i(c) − ℓ_i(c*)) ≤ standard_errors · sd_i(ℓ_i(c) − ℓ_i(c*)) / √n,   ℓ_i: nats of row i's answer

    so that few rows, or rows that disagree, change nothing. Losses, not scores: they use every row and are less noisy.
    """

    Settings = HeldOutSettings
    settings: HeldOutSettings

    def setup(self) -> None:
        """Rows are needed."""
        super().setup()
        self.held_out = self.settings.held_out

    def candidates(self) -> Sequence[Candidate]:
        """What may be chosen; last but one is the individual LoRA alone, last the shared one alone."""
        raise NotImplementedError

    def candidate(self, state: ClientState, change: Candidate) -> ClientState:
        """The state as a candidate answers."""
        raise NotImplementedError

    def personalise(
        self,
        model: AdaptedModel,
        states: Sequence[ClientState],
        rows: Mapping[int, Sequence[Example]],
        placement: Placement,
    ) -> list[ClientState]:
        """Every client's choice, with the losses that speak for it (``EVIDENCE``)."""
        candidates, mine = self.candidates(), [rows[state.client] for state in states]
        if not candidates:
            return list(states)
        losses = []
        for change in candidates if any(mine) else ():
            model.load([self.candidate(state, change) for state in states], placement)
            losses.append(held_out_losses(model, mine))
        model.clear()
        made = []
        for i, state in enumerate(states):
            found = torch.stack([part[i] for part in losses]) if losses else torch.zeros(len(candidates), 0)
            chosen = one_standard_error(found, self.settings.standard_errors)
            evidence = found[[-2, chosen, -1]].float()
            new = self.candidate(state, candidates[chosen])
            made.append(new.with_tensors({Key("", EVIDENCE, E): evidence} if evidence.numel() else {}))
        return made


def one_standard_error(losses: Float[Tensor, "c n"], width: float = 1.0) -> int:
    """The first candidate whose losses are no more than so many standard errors above those of the best.

    >>> one_standard_error(torch.tensor([[1.0, 2.0, 3.0], [0.0, 2.0, 3.5]]))
    0
    >>> one_standard_error(torch.tensor([[1.0, 2.0, 3.0], [0.5, 1.6, 2.4]]))
    1
    """
    if losses.shape[1] < 2:
        return 0
    losses = losses.nan_to_num(nan=_WORST, posinf=_WORST)
    excess = losses - losses[losses.mean(1).argmin()]
    error = excess.std(1) / losses.shape[1] ** 0.5
    return int((excess.mean(1) <= width * error).nonzero()[0])


@torch.no_grad()
def held_out_losses(model: AdaptedModel, rows: Sequence[Sequence[Example]]) -> list[Float[Tensor, " n"]]:
    """Nats of every row under the adapters on the model, over its client's mean number of answer tokens."""
    parts: list[list[Tensor]] = [[] for _ in rows]
    for start in range(0, max(map(len, rows)), _ROWS):
        groups = [mine[start : start + _ROWS] for mine in rows]
        nats = row_losses(model, collate(groups).to(model.device)).double().cpu()
        for found, mine in zip(parts, nats.split(list(map(len, groups))), strict=True):
            found.append(mine)
    tokens = [sum(len(list(example.supervised)) or 1 for example in mine) / max(1, len(mine)) for mine in rows]
    return [torch.cat(found) / max(1.0, count) for found, count in zip(parts, tokens, strict=True)]


def weighed(state: ClientState, weights: Mapping[str, float]) -> ClientState:
    """The state with slots' products times a number."""
    changes = {k: weights[k.slot] * v for k, v in state.tensors.items() if k.factor == B and k.slot in weights}
    return state.with_tensors(changes)


SHIFTS = (1.0, 2.0, 4.0)
_TRAINED: Candidate = {"temperature": 1.0, "shift": 0.0}


def corrections() -> list[Candidate]:
    """Corrections of a mixer of two LoRAs, from none to the ends; at temperature 0 a weight is the same for all tokens.

    Sorted by how far they are from the mixer as trained: |shift| in nats, and one for a mixer that looks at nothing.
    """
    grid: list[Candidate] = [
        {"temperature": t, "shift": b} for t in (1.0, 0.0) for b in (0.0, *SHIFTS, *(-shift for shift in SHIFTS))
    ]
    grid.sort(key=lambda c: abs(c["shift"]) + 1 - c["temperature"])
    return [*grid, {"temperature": 0.0, "shift": -NEVER}, {"temperature": 0.0, "shift": NEVER}]


def corrected(state: ClientState, change: Candidate) -> ClientState:
    """The state whose mixer of two LoRAs has logits τ·G x + (b, 0)."""
    changes = {}
    for key, value in state.tensors.items():
        if key.slot == MIXER and key.factor == G:
            changes[key] = value if change["temperature"] == 1 else change["temperature"] * value
            changes[key._replace(factor=C)] = torch.tensor([[change["shift"]], [0.0]])
    return state.with_tensors(changes)
