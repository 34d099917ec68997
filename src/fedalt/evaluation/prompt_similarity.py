"""How much a prompt resembles a client's training rows, and the weights of LoRAs that follow from it (FedDPA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from fedalt.data.encode import Input, laid_out
from fedalt.model.adapted import AdaptedModel
from fedalt.model.batch_layout import BatchLayout
from fedalt.model.layer import SUM, Placement
from fedalt.model.state import ClientState
from fedalt.names import ANCHOR, E, Key

_ROWS = 16
"""Prompts per client that are read at a time."""


Weights = Sequence[Float[Tensor, "n 2"]] | None
"""Weights of the slots for every client's prompts, where the placement mixes by instance."""


def load_to_answer(
    model: AdaptedModel, states: Sequence[ClientState], prompts: Sequence[Sequence[Input]], placement: Placement
) -> Weights:
    """Put the clients' adapters on the model, ready to answer some prompts, and find the weights these prompts need."""
    weights = instance_weights(model, states, prompts, placement) if placement.mixing.kind == "instance" else None
    model.load(states, placement)
    return weights


@torch.no_grad()
def embeddings(
    model: AdaptedModel, states: Sequence[ClientState], prompts: Sequence[Sequence[Input]], placement: Placement
) -> list[Float[Tensor, "n d"]]:
    """Unit vectors of every client's prompts: the final state of the last token, under ``placement.mixing.embed``.

    Classifiers sum a row up as their heads see it.

    A state of length zero, of which there is no direction, stays zero. Leaves the model without adapters.
    """
    embed = placement.mixing.embed
    if embed:
        model.load(states, replace(placement, slots=embed, mixing=SUM))
    else:
        model.clear()
    found: list[list[Tensor]] = [[] for _ in prompts]
    for start in range(0, max(map(len, prompts)), _ROWS):
        part = [mine[start : start + _ROWS] for mine in prompts]
        rows = [prompt for mine in part for prompt in mine]
        owned = BatchLayout(tuple(map(len, part)), tuple(map(len, rows)))
        out = model.summaries(laid_out(rows).to(model.device), owned).last_hidden_state.float().cpu()
        size = out.norm(dim=1, keepdim=True)
        unit = torch.where(size > 0, out / size, 0)
        for mine, values in zip(found, unit.split([len(mine) for mine in part]), strict=True):
            mine.append(values)
    model.clear()
    return [torch.cat(mine) for mine in found]


def anchors(
    model: AdaptedModel, states: Sequence[ClientState], prompts: Sequence[Sequence[Input]], placement: Placement
) -> list[Float[Tensor, "1 d"]]:
    """The mean of each client's unit vectors."""
    return [units.mean(0, keepdim=True) for units in embeddings(model, states, prompts, placement)]


def instance_weights(
    model: AdaptedModel, states: Sequence[ClientState], prompts: Sequence[Sequence[Input]], placement: Placement
) -> list[Float[Tensor, "n 2"]]:
    """Weights of the two slots for every prompt: c = clamp(λ · ⟨e(q), anchor⟩, 0, 1) for the target, else 1 − c."""
    target = placement.slots.index(placement.mixing.target)
    weights = []
    for state, units in zip(states, embeddings(model, states, prompts, placement), strict=True):
        likeness = (units @ state.tensors[Key("", ANCHOR, E)].T)[:, 0]
        c = (placement.mixing.most * likeness).clamp(0, 1)
        weights.append(torch.stack([c, 1 - c] if target == 0 else [1 - c, c], 1))
    return weights
