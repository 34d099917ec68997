"""Several continuations of a text in one row: where that is exact, and where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedalt.model.adapted import AdaptedModel
from fedalt.model.fast.branching import additive
from support import MODELS, opt


@pytest.mark.parametrize(
    ("make", "exact"), [(MODELS["llama"], True), (MODELS["gpt2"], True), (opt, True), (MODELS["bloom"], False)]
)
def test_each_model_is_tried(make: Callable[[], Any], exact: bool) -> None:
    """Bloom counts distances by places in a row, where branches stand one after another."""
    assert AdaptedModel(make()).branches(32) is exact


def test_a_model_that_ignores_the_mask_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    base = MODELS["llama"]()
    own = base.forward

    def forward(input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **options: Any) -> Any:
        return own(input_ids=input_ids, position_ids=position_ids, **options)

    monkeypatch.setattr(base, "forward", forward)
    assert not AdaptedModel(base).branches(32)


def test_what_is_not_seen_is_pushed_out_of_the_softmax() -> None:
    seen = torch.tensor([[[True, False], [True, True]]])
    mask = additive(seen, torch.float32)
    assert mask.shape == (1, 1, 2, 2)
    assert torch.softmax(torch.zeros(1, 1, 2, 2) + mask, -1).tolist() == [[[[1.0, 0.0], [0.5, 0.5]]]]
