"""The paper's layer as it is written down: one client's two LoRAs and mixer on each target layer, plain autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedalt.model.layer import features
from fedalt.model.targets import find_targets
from fedalt.names import INDIVIDUAL, MIXER, REST_OF_WORLD, A, B, G, Key, Tensors


class DualLora(nn.Module):
    """Two LoRAs beside a frozen layer, weighed per token by a softmax mixer.

        y = W0 x + Σ_i α_i(x) · s · B_i A_i drop(x),   α = softmax(G x) in fp32

    One dropout mask serves both LoRAs, the mixer sees x undropped, and the terms are added one after another. As PEFT
    does, adapters are fp32 whatever the base is.
    """

    def __init__(self, base_layer: nn.Module, r: int, scale: float, dropout: float) -> None:
        super().__init__()
        d_in, d_out = features(base_layer)
        self.base_layer = base_layer
        self.lora_a = nn.ModuleList(nn.Linear(d_in, r, bias=False) for _ in (INDIVIDUAL, REST_OF_WORLD))
        self.lora_b = nn.ModuleList(nn.Linear(r, d_out, bias=False) for _ in (INDIVIDUAL, REST_OF_WORLD))
        self.mixer = nn.Linear(d_in, 2, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.scale = scale
        for module in (self.lora_a[1], self.lora_b[1]):
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus both LoRAs."""
        base: Tensor = self.base_layer(x)
        x = x.to(self.mixer.weight.dtype)
        weights = torch.softmax(self.mixer(x), dim=-1, dtype=torch.float32)
        dropped = self.dropout(x)
        result = base
        for i, (down, up) in enumerate(zip(self.lora_a, self.lora_b, strict=True)):
            result = result + weights[..., i].unsqueeze(-1) * up(down(dropped)) * self.scale
        return result.to(base.dtype)

    def weight_of(self, slot: str, factor: str) -> Tensor:
        """The weight behind a slot and factor."""
        if slot == MIXER:
            return self.mixer.weight
        layer = (self.lora_a if factor == A else self.lora_b)[(INDIVIDUAL, REST_OF_WORLD).index(slot)]
        return layer.weight  # type: ignore[return-value]


class PaperModel:
    """A frozen base with the paper's layer on its targets, for one client at a time."""

    def __init__(self, base: Any, r: int, scale: float, dropout: float) -> None:
        self.base = base.eval().requires_grad_(False)
        self.device = next(base.parameters()).device
        self.layers: dict[str, DualLora] = {}
        for path in find_targets(base):
            self.layers[path] = DualLora(base.get_submodule(path), r, scale, dropout).to(self.device)
            base.set_submodule(path, self.layers[path])

    @property
    def layer_sizes(self) -> dict[str, tuple[int, int]]:
        """Module path → (d_in, d_out) of every adapted layer."""
        return {path: features(layer.base_layer) for path, layer in self.layers.items()}

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Individual LoRA and mixer of every layer."""
        return [p for layer in self.layers.values() for p in layer.parameters() if p.requires_grad]

    def train(self, mode: bool) -> None:
        """Switch adapter dropout; the base stays in eval mode, on every side."""
        self.base.eval()
        for layer in self.layers.values():
            layer.dropout.train(mode)

    @torch.no_grad()
    def load(self, tensors: Tensors) -> None:
        """Take over one client's adapters."""
        for key, value in tensors.items():
            self.layers[key.module].weight_of(key.slot, key.factor).copy_(value)

    def trained(self) -> dict[Key, Tensor]:
        """Copies of what the client trains, as the official code takes them."""
        kept = ((INDIVIDUAL, A), (INDIVIDUAL, B), (MIXER, G))
        return {
            Key(path, slot, factor): layer.weight_of(slot, factor).detach().clone()
            for path, layer in self.layers.items()
            for slot, factor in kept
        }
