"""One frozen base model, resident once, carrying the adapters of whichever clients are on it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fedalt.model.layer import AdaptedLinear, Placement
from fedalt.model.rowmap import MixerProbe, RowContext, RowMap
from fedalt.model.state import ClientState
from fedalt.model.targets import find_targets
from fedalt.names import Key


class AdaptedModel:
    """A frozen causal LM whose target layers hold K clients' adapters, stacked ``[K, …]``.

    Args:
        base: Any Hugging Face causal LM. It is changed in place: its targets are wrapped, its parameters frozen.
        targets: Names of the linear layers to adapt; by architecture when not given.
        gradient_checkpointing: Recompute activations in the backward pass, with the row map of their forward.

    Raises:
        UserError: No target, or a target that is no linear layer.
    """

    def __init__(self, base: Any, targets: Sequence[str] | None = None, gradient_checkpointing: bool = False) -> None:
        self.base = base
        self.base.requires_grad_(False)
        self.context = RowContext()
        self.layers = {path: self._wrap(path, index) for index, path in enumerate(find_targets(base, targets))}
        self.trainable: dict[Key, nn.Parameter] = {}
        if gradient_checkpointing:
            options = {"use_reentrant": False, "context_fn": self.context.checkpoint_contexts}
            self.base.activation_checkpointing_enable(options)
            for module in self.base.modules():
                if getattr(module, "gradient_checkpointing", False):
                    _silence(module)

    @property
    def device(self) -> torch.device:
        """Where the base, and so every batch, lives."""
        device: torch.device = next(self.base.parameters()).device
        return device

    @property
    def layer_sizes(self) -> dict[str, tuple[int, int]]:
        """Module path → (d_in, d_out) of every adapted layer."""
        return {path: (layer.in_features, layer.out_features) for path, layer in self.layers.items()}

    def load(self, states: Sequence[ClientState], placement: Placement, trainable: Sequence[Key] = ()) -> None:
        """Put a cohort's adapters on the base, stacked in the order of ``states``.

        The tensors are copies: training changes the model, never the states.
        """
        self.trainable = {}
        for path, layer in self.layers.items():
            keys = [key for key in states[0].tensors if key.module == path]
            stacked = {key: torch.stack([state.tensors[key] for state in states]).to(self.device) for key in keys}
            mine = [key for key in keys if key in trainable]
            layer.place(placement, stacked, mine)
            self.trainable |= {key: layer.get_parameter(f"{key.slot}_{key.factor}") for key in mine}

    def unstack(self) -> list[dict[Key, Tensor]]:
        """The trainable tensors of every client on the base, back on the CPU."""
        stacked = {key: parameter.detach().cpu() for key, parameter in self.trainable.items()}
        count = len(next(iter(stacked.values()))) if stacked else 0
        return [{key: value[k].clone() for key, value in stacked.items()} for k in range(count)]

    def clear(self) -> None:
        """Take all adapters off: the base answers alone."""
        self.trainable = {}
        for layer in self.layers.values():
            layer.clear()

    def train(self, mode: bool = True) -> None:
        """Switch adapter dropout and checkpointing on or off. The frozen base always runs in eval mode.

        Its own dropout would draw from a stream that everybody in the batch shares; only the flag that Hugging Face's
        checkpointing asks for is set, on the modules that ask, and those modules' own dropout is taken out.
        """
        self.base.eval()
        for module in self.base.modules():
            if isinstance(module, AdaptedLinear) or getattr(module, "gradient_checkpointing", False):
                module.training = mode

    def rows(self, rows: RowMap, probe: MixerProbe | None = None) -> AbstractContextManager[None]:
        """Say which client each row of the enclosed forward passes belongs to."""
        return self.context.rows(rows, probe)

    def _wrap(self, path: str, index: int) -> AdaptedLinear:
        layer = AdaptedLinear(self.base.get_submodule(path), path, index, self.context)
        self.base.set_submodule(path, layer)
        return layer


def _silence(module: nn.Module) -> None:
    """Set a module's dropout probabilities (``dropout``, ``hidden_dropout``, ``layerdrop``, …) to 0."""
    for name, value in vars(module).items():
        if "drop" in name and isinstance(value, float):
            setattr(module, name, 0.0)
