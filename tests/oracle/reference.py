"""Literal implementations that share no code with the package: slow, one client at a time, written from the paper."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

Array = np.ndarray[Any, Any]


def fedalt_delta(x: Array, A_L: Array, B_L: Array, A_R: Array, B_R: Array, G: Array, s: float) -> Array:
    """What the adapters add to ``W0 x``, token by token in fp64: s·[α_L B_L A_L x + α_R B_R A_R x]."""
    out = []
    for token in x.reshape(-1, x.shape[-1]).astype(np.float64):
        z = G.astype(np.float64) @ token
        weights = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        individual = B_L.astype(np.float64) @ (A_L.astype(np.float64) @ token)
        row = B_R.astype(np.float64) @ (A_R.astype(np.float64) @ token)
        out.append(s * (weights[0] * individual + weights[1] * row))
    return np.stack(out).reshape(*x.shape[:-1], -1)


def mean_of_others(
    uploads: Mapping[int, Mapping[Any, Array]], k: int, weights: Mapping[int, float]
) -> dict[Any, Array]:
    """Σ_{m≠k} w_m X_m / Σ_{m≠k} w_m, factor by factor, in fp64."""
    others = [m for m in uploads if m != k]
    total = sum(weights[m] for m in others)
    return {
        key: sum(weights[m] * uploads[m][key].astype(np.float64) for m in others) / total for key in uploads[others[0]]
    }


class LiteralLayer(nn.Module):
    """One client's layer: A_L, B_L and G are parameters, the row is two buffers. ``slots`` maps name → (A, B)."""

    def __init__(self, base_layer: nn.Module, slots: Mapping[str, tuple[Tensor, Tensor]], G: Tensor | None, s: float):
        super().__init__()
        self.base_layer, self.s, self.names = base_layer, s, list(slots)
        for name, (a, b) in slots.items():
            for factor, value in (("A", a), ("B", b)):
                if name == "rest_of_world":
                    self.register_buffer(f"{name}_{factor}", value.clone())
                else:
                    self.register_parameter(f"{name}_{factor}", nn.Parameter(value.clone()))
        self.mixer_G = None if G is None else nn.Parameter(G.clone())

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        weights = None if self.mixer_G is None else torch.softmax(x @ self.mixer_G.T, dim=-1)
        for i, name in enumerate(self.names):
            a, b = getattr(self, f"{name}_A"), getattr(self, f"{name}_B")
            branch = (x @ a.T) @ b.T
            y = y + self.s * (branch if weights is None else weights[..., i : i + 1] * branch)
        return y


class PlainClient:
    """One client's own copy of a Hugging Face model, trained as a textbook would.

    Args:
        base: The base model, copied.
        tensors: (module, slot, factor) → tensor.
        s: LoRA scale.
    """

    def __init__(self, base: Any, tensors: Mapping[Any, Tensor], s: float) -> None:
        self.model = copy.deepcopy(base).requires_grad_(False).eval()
        self.layers: dict[str, LiteralLayer] = {}
        for module in dict.fromkeys(key[0] for key in tensors):
            mine = {(slot, factor): value for (path, slot, factor), value in tensors.items() if path == module}
            names = [slot for slot, factor in mine if factor == "A"]
            slots = {name: (mine[name, "A"], mine[name, "B"]) for name in names}
            layer = LiteralLayer(self.model.get_submodule(module), slots, mine.get(("mixer", "G")), s)
            self.model.set_submodule(module, layer)
            self.layers[module] = layer

    @property
    def parameters(self) -> dict[tuple[str, str, str], nn.Parameter]:
        """Everything that trains, by (module, slot, factor)."""
        named = ((path, name, p) for path, layer in self.layers.items() for name, p in layer.named_parameters())
        return {(path, *name.split("_")): p for path, name, p in named if p.requires_grad}  # type: ignore[misc]

    def loss(self, rows: Sequence[Any], pad: int) -> Tensor:
        """Mean cross-entropy of the answer tokens of this client's rows alone, right-padded, in the base's dtype."""
        width = max(len(row.prompt) + len(row.answer) for row in rows)
        ids, labels, mask = [], [], []
        for row in rows:
            tokens = [*row.prompt, *row.answer]
            rest = width - len(tokens)
            ids.append(tokens + [pad] * rest)
            mask.append([1] * len(tokens) + [0] * rest)
            labels.append([-100] * len(row.prompt) + list(row.answer) + [-100] * rest)
        logits = self.model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), torch.tensor(labels)[:, 1:].flatten(), ignore_index=-100)

    def train(
        self,
        steps: Sequence[Sequence[Any]],
        pad: int,
        lr: float,
        decay: float,
        clip: float,
        penalty: Callable[[], Tensor | float] = lambda: 0.0,
    ) -> list[float]:
        """torch's AdamW with clipping, learning rate linear to 0; returns the loss of every step, without penalty."""
        parameters = list(self.parameters.values())
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(steps))
        losses = []
        for rows in steps:
            loss = self.loss(rows, pad)
            optimizer.zero_grad()
            (loss + penalty()).backward()
            torch.nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        return losses


def merged(base: Any, tensors: Mapping[Any, Tensor], slot: str, s: float) -> Any:
    """A copy of an unwrapped model with W0 + s·B·A in its weights."""
    model = copy.deepcopy(base)
    for (module, name, factor), a in tensors.items():
        if name == slot and factor == "A":
            layer, change = model.get_submodule(module), s * tensors[module, slot, "B"] @ a
            layer.weight.data += change.T if type(layer).__name__ == "Conv1D" else change
    return model
