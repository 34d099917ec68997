"""What a GPU does in one call is what a CPU does client by client."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedalt.model.fast import fused


@pytest.mark.parametrize("counts", [(5, 0, 7, 3), (1, 2), (0, 6), (1, 0, 0)])
@pytest.mark.parametrize(("narrow", "wide"), [(2, 24), (12, 20), (16, 32)])
def test_products_in_one_call_equal_products_client_by_client(counts: tuple[int, ...], narrow: int, wide: int) -> None:
    """In bf16, whose rows must start at 16 bytes: sizes that the kernel takes, and sizes that are padded for it."""
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(sum(counts), size, generator=generator).bfloat16() for size in (narrow, wide))
    w = torch.randn(len(counts), wide, narrow, generator=generator).bfloat16()
    for one, matrices in ((x, w.transpose(1, 2)), (y, w)):
        expected = fused.per_client(one, matrices, counts)
        torch.testing.assert_close(fused.joint(one, matrices, counts), expected, rtol=1e-2, atol=1e-2)
    for one, other in ((x, y), (y, x)):
        expected = fused.outer_per_client(one, other, counts)
        found = fused.joint_outer(one, other, counts)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
        assert not any(found[k].any() for k, count in enumerate(counts) if not count)


def test_clients_without_tokens_get_zeros_whatever_the_kernel_leaves_there(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.nn.functional.grouped_mm

    def careless(*args: Any, **options: Any) -> torch.Tensor:
        out = own(*args, **options)
        out[1] = torch.nan
        return out

    monkeypatch.setattr(fused.F, "grouped_mm", careless)
    x = torch.ones(3, 8, dtype=torch.bfloat16)
    assert fused.joint_outer(x, x, (1, 0, 2))[:, 0, 0].tolist() == [1, 0, 2]
