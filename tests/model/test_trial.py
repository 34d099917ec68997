"""What a model is tried for: a difference that rounding makes passes, one that something else makes does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedalt.model import adapted
from fedalt.model.adapted import AdaptedModel
from fedalt.model.batch_layout import BatchLayout
from fedalt.model.fast.branching import agree, untouched
from support import gpt2

STATES = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize(("dtype", "passes", "fails"), [(FULL, 5e-5, 2e-4), (HALF, 0.05, 0.2)])
def test_two_ways_may_differ_by_what_the_dtype_rounds(dtype: torch.dtype, passes: float, fails: float) -> None:
    assert agree(STATES * (1 + passes), STATES, dtype)
    assert not agree(STATES * (1 + fails), STATES, dtype)
    assert not agree(STATES * torch.nan, STATES, dtype)


@pytest.mark.parametrize(("dtype", "passes", "fails"), [(FULL, 5e-5, 2e-4), (HALF, 1e-3, 5e-3)])
@pytest.mark.parametrize("change", [1.0, 0.1])
def test_a_change_may_be_seen_where_it_was_made_only(
    dtype: torch.dtype, passes: float, fails: float, change: float
) -> None:
    """Measured by what it did there."""

    def after(leak: float) -> Tensor:
        return STATES * (1 + change * torch.tensor([leak, 1.0, leak]))[:, None]

    assert untouched(after(0.0), STATES, 1, dtype)
    assert untouched(after(passes), STATES, 1, dtype)
    assert not untouched(after(fails), STATES, 1, dtype)
    assert not untouched(after(0.0) * torch.nan, STATES, 1, dtype)


@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_a_model_that_counts_positions_through_all_rows_is_padded(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = adapted._packed

    def counted_on(ids: Tensor, rows: BatchLayout, *more: object) -> dict[str, Tensor]:
        return own(ids, rows, *more) | {"position_ids": torch.arange(len(ids))[None]}

    assert AdaptedModel(gpt2().to(dtype)).packs
    monkeypatch.setattr(adapted, "_packed", counted_on)
    model = AdaptedModel(gpt2().to(dtype))
    assert not model.packs
    assert model.unpacked == "packed rows give other states than rows alone"


@pytest.mark.parametrize("dtype", [FULL, HALF])
def test_branches_that_see_each_other_are_not_used(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert AdaptedModel(gpt2().to(dtype)).branches(32)
    leaking = "fedalt.model.fast.branching.additive"
    monkeypatch.setattr(
        leaking,
        lambda seen, kind: torch.zeros(seen.shape, dtype=kind)[:, None].masked_fill(
            ~torch.ones_like(seen).tril()[:, None], torch.finfo(kind).min
        ),
    )
    assert not AdaptedModel(gpt2().to(dtype)).branches(32)
