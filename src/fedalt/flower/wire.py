"""Tensors on the wire: one safetensors block, in fp32, bf16, or int8 with a scale per row.

    int8:   scale_i = max_j |x_ij| / 127,   q_ij = round(x_ij / scale_i),   x̂_ij = scale_i · q_ij

A site takes as its upload what ``unpack(pack(...))`` gives, which is exactly what the server received.
"""

from __future__ import annotations

from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedalt.errors import UserError
from fedalt.names import Key, Tensors

Wire = Literal["fp32", "bf16", "int8"]
_SCALE = "|scale"


def pack(tensors: Tensors, wire: Wire = "fp32") -> bytes:
    """One block of bytes; nothing for no tensors."""
    if not tensors:
        return b""
    block: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if wire == "int8":
            codes, scale = _rounded(value)
            block |= {str(key): codes, f"{key}{_SCALE}": scale}
        else:
            block[str(key)] = value.to(torch.bfloat16 if wire == "bf16" else value.dtype)
    return save(block)


def unpack(data: bytes) -> dict[Key, Tensor]:
    """The tensors of ``pack``, in fp32.

    Raises:
        UserError: The bytes are no such block.
    """
    if not data:
        return {}
    try:
        block = load(data)
        return {Key.parse(name): _whole(block, name) for name in sorted(block) if not name.endswith(_SCALE)}
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{len(data)} bytes are no tensors ({error})") from None


def _rounded(value: Tensor) -> tuple[Tensor, Tensor]:
    rows = value.float().reshape(len(value), -1) if value.dim() > 1 else value.float().reshape(1, -1)
    scale = rows.abs().amax(1, keepdim=True) / 127
    codes = torch.where(scale > 0, rows / scale, 0).round().to(torch.int8)
    return codes.reshape(value.shape), scale


def _whole(block: dict[str, Tensor], name: str) -> Tensor:
    value = block[name]
    if value.dtype == torch.int8:
        scale = block[f"{name}{_SCALE}"]
        return (value.reshape(len(scale), -1).float() * scale).reshape(value.shape)
    if not value.is_floating_point():
        raise ValueError(f"{name} is {value.dtype}")
    return value.float()
