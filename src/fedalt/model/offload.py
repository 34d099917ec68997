"""Bases larger than their device: accelerate keeps what has no room there in memory or on disk, until its layer runs.

Every layer computes on ``model.device``, so adapters are beside their layers. Between two calls an offloaded weight is
on the meta device, so nothing may read it past its layer's forward.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from accelerate.utils import align_module_device, convert_file_size_to_int, has_offloaded_params
from torch import Tensor, nn

from fedalt.config import ModelConfig
from fedalt.errors import UserError, first_line
from fedalt.model.targets import is_linear

_SHARE = 0.7
"""Of what is free on the device and in memory, what weights take at most where ``model.max_memory`` does not say."""


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on a GPU also what torch has taken there and does not use."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return int(psutil.virtual_memory().available)


def spread(config: ModelConfig, device: torch.device) -> dict[str, Any]:
    """What tells ``from_pretrained`` to fill the device first, then memory, then the disk."""
    for setting, value, why in (
        ("task", config.task != "causal_lm", "heads are trained, so they cannot be fetched anew for every call"),
        ("load_in", config.load_in, "quantised weights are not offloaded"),
        (
            "adapter",
            config.adapter and config.adapter_as == "merged",
            "a merge changes weights; adapter_as=start works",
        ),
    ):
        if value:
            raise UserError(f"model.device_map: auto does not go with this model.{setting}: {why}")
    here: int | str = "cpu" if device.type == "cpu" else device.index or 0
    room: dict[int | str, int] = {"cpu": int(_SHARE * free_memory(torch.device("cpu")))}
    if here not in room:
        room[here] = int(_SHARE * free_memory(device))
    for place, most in (config.max_memory or {}).items():
        if place not in room:
            raise UserError(
                f"model.max_memory: {place} is not where the base computes; allowed: {', '.join(map(str, room))}"
            )
        try:
            room[place] = convert_file_size_to_int(most)
        except ValueError as error:
            raise UserError(f"model.max_memory: {first_line(error)}") from None
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # a note says it better
    return {"device_map": "auto", "max_memory": room, "offload_folder": _folder()}


def _folder() -> str:
    """Where weights go that are kept in another form than in their file; it is removed when Python ends."""
    _FOLDERS.append(TemporaryDirectory(prefix="fedalt-offload-"))
    return _FOLDERS[-1].name


_FOLDERS: list[TemporaryDirectory[str]] = []


def offloads(base: nn.Module) -> bool:
    """Whether some weights are fetched for each call."""
    return any(has_offloaded_params(module) for module in base.modules())


def device_of(base: nn.Module) -> torch.device:
    """Where a base computes."""
    hook: Any = getattr(base, "_hf_hook", None)
    return torch.device(hook.execution_device) if hook else next(base.parameters()).device


def held(base: nn.Module, name: str, weight: Tensor) -> Tensor:
    """The numbers of a weight, read where they are kept."""
    if weight.device.type != "meta":
        return weight
    path, _, leaf = name.rpartition(".")
    module = base.get_submodule(path)
    with align_module_device(module, torch.device("cpu")):
        return getattr(module, leaf).detach()  # type: ignore[no-any-return]


def places(base: Any) -> str:
    """What is kept where; empty where all of a base is on its device."""
    if not offloads(base):
        return ""
    parts = defaultdict[str, list[str]](list)
    for path, place in base.hf_device_map.items():
        parts[f"cuda:{place}" if isinstance(place, int) else str(place)].append(path)
    said = [
        f"{place} {sum(_size(base, path) for path in paths) / 1e6:,.1f} MB "
        f"({f'{paths[0]} to {paths[-1]}' if paths[0] else 'everything'})"
        for place, paths in parts.items()
    ]
    return f"model.device_map: {', '.join(said)}; computed on {device_of(base)}"


def _size(base: Any, path: str) -> int:
    """Bytes of a module's weights; those that are another's count there."""
    named = base.get_submodule(path).named_parameters(prefix=path)
    return sum(weight.nbytes for name, weight in named if name not in base.all_tied_weights_keys)


class _Fetched(torch.autograd.Function):
    """A frozen linear layer whose weight is fetched again for the gradient, not kept from the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, own: Any) -> Tensor:
        ctx.layer = layer
        y: Tensor = own(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with align_module_device(ctx.layer):
            weight = ctx.layer.weight
            return grad @ (weight if isinstance(ctx.layer, nn.Linear) else weight.t()), None, None


def fetch_again(base: nn.Module) -> None:
    """Let a step hold one offloaded weight at a time: autograd would keep all of them on the device until the end."""
    for module in base.modules():
        if is_linear(module) and has_offloaded_params(module):
            module.forward = partial(_call, module, module.forward)


def _call(layer: Any, own: Any, x: Tensor) -> Tensor:
    return _Fetched.apply(x, layer, own)  # type: ignore[no-any-return, no-untyped-call]
