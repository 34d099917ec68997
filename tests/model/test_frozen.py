"""Packed frozen weights compute what the plain layers compute, forwards and backwards, and change nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedalt.model.fast import patches
from fedalt.model.fast.patches import pack_weights
from support import MODELS, relative

D_IN, D_OUT = 24, 40
AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "linear": nn.Linear(D_IN, D_OUT),
        "no bias": nn.Linear(D_IN, D_OUT, bias=False),
        "conv1d": Conv1D(D_OUT, D_IN),
        "bf16": nn.Linear(D_IN, D_OUT).bfloat16(),
    }


def value_and_gradient(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (y.float() * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("name", list(layers()))
@pytest.mark.parametrize("rows", [(1, 1), (3, 5), (700,)])
def test_packed_equals_plain(name: str, rows: tuple[int, ...]) -> None:
    layer = layers()[name].requires_grad_(False)
    x = torch.randn(*rows, D_IN, generator=torch.Generator().manual_seed(1)).to(layer.weight.dtype)  # type: ignore[arg-type]
    plain = value_and_gradient(layer, x)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    packed = pack_weights(nn.Sequential(layer))
    if name == "bf16" and not packed and not AVX512:
        pytest.skip("oneDNN has no bf16 products on this CPU")
    assert packed == 1
    tolerance = 1e-2 if name == "bf16" else 1e-6
    for actual, expected in zip(value_and_gradient(layer, x), plain, strict=True):
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        assert relative(actual.float(), expected.float()) < tolerance
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_every_linear_layer_of_a_model_is_packed_its_head_included() -> None:
    model = MODELS["gpt2"]()
    ids = torch.arange(3, 20)[None]
    expected = model(ids).logits
    assert pack_weights(model) == 2 * 4 + 1
    assert relative(model(ids).logits, expected) < 1e-6


def test_nothing_is_packed_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS["llama"]()
    size = sum(2 * m.weight.numel() * 4 for m in model.modules() if isinstance(m, nn.Linear))
    for free, packed in ((2 * size - 8, False), (2 * size, True)):
        monkeypatch.setattr(patches.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert bool(pack_weights(model)) is packed


def test_nothing_is_packed_where_the_operators_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(weight: Tensor) -> Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(patches, "_pack", missing)
    assert pack_weights(MODELS["llama"]()) == 0


def test_other_types_are_left_alone() -> None:
    assert pack_weights(MODELS["llama"]().double()) == 0
    assert pack_weights(MODELS["llama"]().half()) == 0
