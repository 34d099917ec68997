"""What a GPU does in one call is what a CPU does client by client."""

from __future__ import annotations

import pytest
import torch

from fedalt.model import grouped


@pytest.mark.parametrize("counts", [(5, 0, 7, 3), (1, 2), (0, 6)])
@pytest.mark.parametrize(("narrow", "wide"), [(2, 24), (12, 20), (16, 32)])
def test_products_in_one_call_equal_products_client_by_client(counts: tuple[int, ...], narrow: int, wide: int) -> None:
    """What a GPU does with unequal counts; sizes that the kernel takes, and sizes that must be padded for it."""
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(sum(counts), size, generator=generator) for size in (narrow, wide))
    w = torch.randn(len(counts), wide, narrow, generator=generator)
    up, down = w.transpose(1, 2), w
    for one, matrices in ((x, up), (y, down)):
        expected = grouped.per_client(one, matrices, counts)
        torch.testing.assert_close(grouped.grouped(one, matrices, counts), expected, rtol=1e-5, atol=1e-5)
    for one, other in ((x, y), (y, x)):
        expected = grouped.outer_per_client(one, other, counts)
        torch.testing.assert_close(grouped.grouped_outer(one, other, counts), expected, rtol=1e-5, atol=1e-5)
