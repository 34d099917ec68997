"""One plain PEFT LoRA on the base: the rank, targets and start values of fedalt's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedalt.benchmarks.sides.plain import silence
from fedalt.benchmarks.workload import LORA
from fedalt.config import RunConfig
from fedalt.methods.registry import build
from fedalt.model.layer import features
from fedalt.model.state import initial_state
from fedalt.model.targets import find_targets
from fedalt.names import A


class PeftLora:
    """A ``PeftModel`` with one adapter, which starts anew for every client."""

    def __init__(self, base: Any, dropout: float, seed: int) -> None:
        from peft import LoraConfig, get_peft_model

        silence(base)
        sizes = {path: features(base.get_submodule(path)) for path in find_targets(base)}
        config = LoraConfig(r=LORA.r, lora_alpha=int(LORA.alpha), lora_dropout=dropout, target_modules=list(sizes))
        self.base = base
        self.model: Any = get_peft_model(base, config)
        start = initial_state(build(RunConfig(method="fedit"), 1, sizes).shape, 0, seed, LORA.init, LORA.mixer_init)
        self.start: list[tuple[nn.Parameter, Tensor]] = []
        for key, value in start.tensors.items():
            layer = base.get_submodule(key.module)
            self.start.append(((layer.lora_A if key.factor == A else layer.lora_B)["default"].weight, value))

    @property
    def trainable(self) -> list[nn.Parameter]:
        """A and B of every layer."""
        return [parameter for parameter, _ in self.start]

    @torch.no_grad()
    def reset(self) -> None:
        """A fresh adapter."""
        for parameter, value in self.start:
            parameter.copy_(value)

    @torch.no_grad()
    def install(self, tensors: list[Tensor]) -> None:
        """Overwrite A and B of every layer."""
        for parameter, value in zip(self.trainable, tensors, strict=True):
            parameter.copy_(value)

    def upload(self) -> list[Tensor]:
        """Copies of A and B of every layer."""
        return [parameter.detach().cpu().clone() for parameter in self.trainable]
