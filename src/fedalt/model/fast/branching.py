"""Several continuations of a text in one row: branches, each of which sees the text and itself.

A beam search that gives every beam a row of its own keeps the text's keys and values once per beam, and copies a whole
beam's whenever another one goes on from it. In one row the text is there once, and going on from another beam is a
change of the mask:

    text        beam 1: a d     mask of d:  text, a, d
    t t t  <    beam 2: b e     mask of e:  text, b, e        row: t t t a b c d e f
                beam 3: c f     mask of f:  text, c, f
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fedalt.model.batch_layout import BatchContext, BatchLayout

_NEEDS = {"position_ids", "attention_mask"}


def additive(seen: Bool[Tensor, "n q k"], dtype: torch.dtype) -> Float[Tensor, "n 1 q k"]:
    """What is added to attention scores so that a token sees what it may."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


@torch.no_grad()
def branches_exactly(base: Any, context: BatchContext, clients: int) -> bool:
    """Try branches on this very model: they must give what rows of their own give."""
    if not signature(base.forward).parameters.keys() >= _NEEDS:
        return False
    device = next(base.parameters()).device
    text, branches = torch.arange(1, 6, device=device), torch.tensor([[6], [7]], device=device)
    others = (0,) * (clients - 1)
    with context.rows(BatchLayout((2, *others))):
        own = base(input_ids=torch.cat([text.expand(2, -1), branches], 1), use_cache=False).logits[:, -1]
    seen = torch.ones(1, 7, 7, dtype=torch.bool, device=device).tril()
    seen[:, 6, 5] = False
    options = {
        "attention_mask": additive(seen, base.dtype),
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 5]], device=device),
        "use_cache": False,
    }
    row = torch.cat([text, branches[:, 0]])[None]
    changed = row.clone()
    changed[0, 5] = 8
    try:
        with context.rows(BatchLayout((1, *others))):
            tried, beside = (base(input_ids=ids, **options).logits[0] for ids in (row, changed))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # whatever a model makes of such a mask
        return False
    return untouched(beside[5:], tried[5:], 0, base.dtype) and agree(tried[5:], own, base.dtype)


def agree(tried: Tensor, plain: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways differ by no more than a deep model of this dtype rounds."""
    return _apart(tried, plain) <= (0.1 if _half(dtype) else 1e-4)


def untouched(after: Tensor, before: Tensor, own: int, dtype: torch.dtype) -> bool:
    """Whether a change was seen where it was made (``own``), and nowhere else.

    ``after`` are the states of the way that is tried, ``before`` those at the same places before the change.
    """
    others = [at for at in range(len(after)) if at != own]
    most = (2e-3 if _half(dtype) else 1e-4) * _apart(after[own], before[own])
    return _apart(after[others], before[others]) <= most


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


def _half(dtype: torch.dtype) -> bool:
    return dtype not in (torch.float32, torch.float64)
