"""Tensors on the wire: one safetensors block, in fp32, bf16, or int8 with a scale per row.

    int8:   scale_i = max_j |x_ij| / 127,   q_ij = round(x_ij / scale_i),   x̂_ij = scale_i · q_ij

A site takes as its upload what ``unpack(pack(...))`` gives, which is exactly what the server received. Whoever unpacks
compares names, shapes, dtypes and sizes with what the run has, from the block's header, before any number is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedalt.errors import UserError, shortened
from fedalt.flower.requests import once
from fedalt.names import Key, Tensors

Wire = Literal["fp32", "bf16", "int8"]
Shape = tuple[int, ...]
_SCALE = "|scale"
_DTYPES = {"fp32": "F32", "bf16": "BF16", "int8": "I8"}
_BYTES = {"F32": 4, "BF16": 2, "I8": 1}
_LONGEST_HEADER = 32_000_000
_FIELDS = {"dtype", "shape", "data_offsets"}


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
            block[str(key)] = value.to(torch.bfloat16 if wire == "bf16" else torch.float32)
    return save(block)


def unpack(
    data: bytes, wire: Wire = "fp32", check: Callable[[Mapping[Key, Shape]], None] = lambda shapes: None
) -> dict[Key, Tensor]:
    """The tensors of ``pack``, in fp32; ``check`` refuses names and shapes, before any number is read."""
    if not data:
        return {}
    try:
        shapes = _shapes(data, wire)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{len(data)} bytes are no tensors in {wire} ({shortened(str(error), 100)})") from None
    check(shapes)
    try:
        block = load(data)
    except SafetensorError as error:
        raise UserError(f"{len(data)} bytes are no tensors in {wire} ({shortened(str(error), 100)})") from None
    return {key: _whole(block, str(key)) for key in sorted(shapes, key=str)}


def _shapes(data: bytes, wire: Wire) -> dict[Key, Shape]:
    """Names and shapes by the header, which describes every byte of the block and nothing else."""
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data) - 8, _LONGEST_HEADER):
        raise ValueError("its header is cut off")
    header: dict[str, Any] = json.loads(data[8 : 8 + length].decode(), object_pairs_hook=once)
    if not isinstance(header, dict):
        raise ValueError("its header is no mapping")
    sizes = {name: _shape(name, entry) for name, entry in header.items()}
    shapes = {name: shape for name, shape in sizes.items() if not name.endswith(_SCALE)}
    scales = {f"{name}{_SCALE}": (_rows(shape), 1) for name, shape in shapes.items()} if wire == "int8" else {}
    if sizes != shapes | scales:
        raise ValueError("it has not the scales that belong to its numbers")
    at, dtypes = 0, dict.fromkeys(shapes, _DTYPES[wire]) | dict.fromkeys(scales, "F32")
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        size = prod(sizes[name]) * _BYTES[dtypes[name]]
        if entry["dtype"] != dtypes[name] or entry["data_offsets"] != [at, at + size]:
            raise ValueError(f"{name} is not {dtypes[name]}, or not where it should be")
        at += size
    if 8 + length + at != len(data):
        raise ValueError("it has another size than its header says")
    keys = {Key.parse(name): shape for name, shape in shapes.items()}
    if any(str(key) not in shapes for key in keys):
        raise ValueError("it has names of fedalt 0.1")
    return keys


def _shape(name: str, entry: Any) -> Shape:
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise ValueError(f"{name} is described by other words than a tensor's")
    for least, numbers in ((1, entry["shape"]), (0, entry["data_offsets"])):
        if not isinstance(numbers, list) or len(numbers) > 4 or any(type(n) is not int or n < least for n in numbers):
            raise ValueError(f"{name} has no shape or place")
    return tuple(entry["shape"])


def _rows(shape: Shape) -> int:
    """How many scales there are."""
    return shape[0] if len(shape) > 1 else 1


def _rounded(value: Tensor) -> tuple[Tensor, Tensor]:
    rows = value.float().reshape(_rows(tuple(value.shape)), -1)
    scale = rows.abs().amax(1, keepdim=True) / 127
    codes = torch.where(scale > 0, rows / scale, 0).round().to(torch.int8)
    return codes.reshape(value.shape), scale


def _whole(block: dict[str, Tensor], name: str) -> Tensor:
    value = block[name]
    if value.dtype == torch.int8:
        scale = block[f"{name}{_SCALE}"]
        return (value.reshape(len(scale), -1).float() * scale).reshape(value.shape)
    return value.float()
