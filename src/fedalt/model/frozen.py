"""Frozen weights, packed once for the CPU: oneDNN reads them in blocks of its own and would arrange them at every call.

Packing pays because nothing changes these weights: they are laid out once for the forward pass and once, transposed,
for the gradient to the input. Modules keep their type, their parameters and their place; only their call is replaced.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn

_ROWS = 512
"""Rows of input that packed weights are laid out for; others work as well."""
_SHARE = 0.5
"""Most of the free memory that packed copies may take."""


class _Product(torch.autograd.Function):
    """``x Wᵀ + b`` with both directions packed; W and b are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forwards: Tensor, backwards: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(backwards)
        return _linear(x, forwards, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (backwards,) = ctx.saved_tensors
        return _linear(grad, backwards, None), None, None, None


def pack_weights(model: nn.Module) -> int:
    """Pack the weights of every plain linear layer on the CPU, if both copies fit well into free memory.

    Returns:
        Number of layers packed; 0 on a GPU, for quantised layers, without oneDNN, or when memory is short.
    """
    layers: list[Any] = [module for module in model.modules() if _plain(module)]
    size = sum(2 * layer.weight.numel() * layer.weight.element_size() for layer in layers)
    if not layers or size > _SHARE * psutil.virtual_memory().available or not _available(layers[0].weight):
        return 0
    for layer in layers:
        weight = layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().t()
        layer.forward = partial(_call, _pack(weight), _pack(weight.t()), layer.bias)
    return len(layers)


def _call(forwards: Tensor, backwards: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return _Product.apply(x, forwards, backwards, bias)  # type: ignore[no-any-return, no-untyped-call]


def _plain(module: nn.Module) -> bool:
    if type(module) is not nn.Linear and type(module).__name__ != "Conv1D":
        return False
    weight: Any = module.weight
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)


def _available(weight: Tensor) -> bool:
    """Whether this build of torch has the operators, tried on a corner of a weight."""
    corner = weight.detach()[:16, :16].contiguous()
    x = torch.ones(3, corner.shape[1], dtype=corner.dtype)
    try:
        return torch.allclose(_linear(x, _pack(corner), None), x @ corner.t(), rtol=1e-2, atol=1e-3)
    except (AttributeError, RuntimeError):
        return False


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    return packed


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")
    return y
