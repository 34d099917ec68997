"""Packed rows: attention stays inside each row, and a model for which packing is not exact is found out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from fedalt.model.adapted import AdaptedModel
from fedalt.model.batch_layout import BatchLayout, layout
from fedalt.model.fast import packing
from fedalt.model.fast.packing import attend, attend_by_kernel
from support import HIDDEN, LAYERS, MODELS, SMALL, VOCAB, WIDE, bert, opt, quick, relative

CPU = torch.device("cpu")
LENGTHS = (7, 1, 12, 11, 3, 7)


@quick
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_every_token_has_one_slot_in_a_group_of_like_rows(lengths: list[int]) -> None:
    how = layout(lengths, CPU)
    assert torch.equal(how.token[how.slot], torch.arange(sum(lengths)))
    assert len(how.slot.unique()) == sum(lengths)
    assert sum(group.rows for group in how.groups) == len(lengths)
    assert sum(group.rows * group.width for group in how.groups) == len(how.token) <= 1.25 * sum(lengths)
    assert sum(int(group.mask.sum()) for group in how.groups) == sum(lengths)
    widths = [group.width for group in how.groups]
    assert widths == sorted(widths, reverse=True)
    assert len(how.groups) <= 1 + math.log(60) / math.log(1.25)


def literal(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], causal: bool) -> Tensor:
    """Row by row, head by head, one softmax per token."""
    rows, start = [], 0
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    for length in lengths:
        here = slice(start, start + length)
        scores = q[0, :, here] @ k[0, :, here].transpose(1, 2) / q.shape[-1] ** 0.5
        if causal:
            scores = scores + torch.full((length, length), -math.inf).triu(1)
        rows.append(torch.softmax(scores, -1) @ v[0, :, here])
        start += length
    return torch.cat(rows, 1).transpose(0, 1)[None]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [4, 2], ids=["all heads", "grouped keys"])
def test_attention_and_its_gradients_equal_those_of_each_row_alone(causal: bool, heads: int) -> None:
    generator, tokens = torch.Generator().manual_seed(1), sum(LENGTHS)
    leaves = [
        torch.randn(1, h, tokens, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for h in (4, heads, heads)
    ]
    weight = torch.randn(1, tokens, 4, 8, generator=generator, dtype=torch.float64)
    packed = attend(*leaves, layout(LENGTHS, CPU), None, causal=causal)
    grads = torch.autograd.grad((packed * weight).sum(), leaves)
    alone = literal(*leaves, LENGTHS, causal)
    torch.testing.assert_close(packed, alone, rtol=1e-12, atol=1e-12)
    for grad, expected in zip(grads, torch.autograd.grad((alone * weight).sum(), leaves), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


def by_the_book(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *rest: Any, **options: Any) -> Tensor:
    """What torch's documentation says of its kernel, row by row."""
    assert torch.equal(starts, rest[0])
    assert rest[1:] == (max(LENGTHS), max(LENGTHS))
    assert starts.dtype == torch.int32
    assert options.get("enable_gqa") or q.shape[1] == k.shape[1]
    causal = {(-1, 0): True, (-1, -1): False}[options["window_size"]]
    scale = options["scale"] or q.shape[-1] ** -0.5
    each = [x.transpose(0, 1)[None] for x in (q * scale * q.shape[-1] ** 0.5, k, v)]
    return literal(*each, starts.diff().tolist(), causal)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [4, 2], ids=["all heads", "grouped keys"])
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_the_kernel_is_told_what_the_groups_compute(
    causal: bool, heads: int, scaling: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU is needed for the arguments; the kernel itself is tried below, where there is one."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_the_book)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, h, sum(LENGTHS), 8, generator=generator) for h in (4, heads, heads))
    how = layout(LENGTHS, CPU)
    grouped, told = (one(q, k, v, how, scaling, causal=causal) for one in (attend, attend_by_kernel))
    torch.testing.assert_close(told, grouped, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is for GPUs")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [4, 2], ids=["all heads", "grouped keys"])
def test_the_kernel_and_its_gradients_equal_the_groups(dtype: torch.dtype, causal: bool, heads: int) -> None:
    generator, device = torch.Generator().manual_seed(1), torch.device("cuda")
    drawn = [torch.randn(1, h, sum(LENGTHS), 32, generator=generator) for h in (4, heads, heads)]
    found = []
    for kind in (dtype, torch.float32):  # in fp32 it is the groups that attend
        leaves = [x.to(device, kind).requires_grad_() for x in drawn]
        y = attend(*leaves, layout(LENGTHS, device), None, causal=causal)
        found.append((y, *torch.autograd.grad((y.float() ** 2).sum(), leaves)))
    for half, full in zip(*found, strict=True):
        assert relative(half.float(), full) < 3e-2


@pytest.mark.parametrize("make", [*MODELS.values(), opt, bert])
def test_packed_states_equal_padded_ones(make: object) -> None:
    model = AdaptedModel(make())  # type: ignore[operator]
    ids = torch.randint(3, VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2))
    rows = BatchLayout((len(LENGTHS),), LENGTHS)
    with torch.no_grad():
        packed, padded = (model.hidden(ids, rows, packed=how)[0] for how in (True, False))
        wanted = torch.tensor([4, 0, 19])
        some = model.hidden(ids, rows, wanted)[0]
    assert model.packs
    assert packed.shape == (sum(LENGTHS), HIDDEN)
    assert relative(packed, padded) < 1e-5
    assert relative(some, padded[wanted]) < 1e-5


def test_a_model_uses_its_own_attention_again_after_packed_rows() -> None:
    model = AdaptedModel(MODELS["llama"]())
    before = model.base.config._attn_implementation
    model.hidden(torch.arange(3, 9), BatchLayout((2,), (2, 4)))
    assert model.base.config._attn_implementation == before
    with pytest.raises(IndexError):
        model.hidden(torch.tensor([VOCAB + 5]), BatchLayout((1,), (1,)))
    assert model.base.config._attn_implementation == before


def mamba() -> MambaForCausalLM:
    """A state runs through all tokens, from one row into the next."""
    return MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, state_size=4))


def gemma() -> Gemma2ForCausalLM:
    """Attention scores are soft-capped."""
    config = Gemma2Config(num_key_value_heads=2, head_dim=8, initializer_range=WIDE, **SMALL)
    return Gemma2ForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "targets", "why"), [(mamba, ["in_proj"], "its rows see each other"), (gemma, None, "NotPackable: ")]
)
def test_a_model_whose_rows_would_touch_is_padded_and_says_why(make: object, targets: list[str], why: str) -> None:
    torch.manual_seed(0)
    model = AdaptedModel(make(), targets=targets)  # type: ignore[operator]
    assert not model.packs
    assert model.unpacked.startswith(why)


def test_lack_of_memory_is_no_reason_to_pad(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure that has nothing to do with the model must not slow it down in silence."""

    def short(*arguments: object, **options: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(packing, "attend", short)
    with pytest.raises(torch.OutOfMemoryError):
        AdaptedModel(MODELS["llama"]())


def test_packing_can_be_forbidden() -> None:
    model = AdaptedModel(MODELS["llama"](), packing=False)
    assert not model.packs and not model.unpacked


def test_a_sliding_window_slides_inside_each_row() -> None:
    config = MistralConfig(num_key_value_heads=2, initializer_range=WIDE, sliding_window=16, **SMALL)
    torch.manual_seed(0)
    model = AdaptedModel(MistralForCausalLM(config).eval())
    ids, rows = torch.arange(3, 43), BatchLayout((2,), (22, 18))
    assert model.packs
    with torch.no_grad():
        assert relative(model.hidden(ids, rows)[0], model.hidden(ids, rows, packed=False)[0]) < 1e-5
