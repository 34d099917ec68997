"""AdamW over stacked clients: every client has its own step count, learning rate and clipping."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

_TOGETHER = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Numbers that are moved together: a CPU keeps a megabyte near by, a GPU waits for every launch."""


class StackedAdamW:
    """AdamW on tensors ``[k, …]`` as if each of the k slices had an optimiser of its own.

    Per client: clip the gradient to ``max_grad_norm`` over all of its tensors, then

        m ← β1 m + (1−β1) g,   v ← β2 v + (1−β2) g²,   p ← p − lr·(wd·p + m̂ / (√v̂ + ε))

    A client that is not active in a step keeps its parameters, its moments and its step count bit for bit.
    β = (.9, .999) and ε = 1e-8, as in the paper's code.
    """

    betas = (0.9, 0.999)
    eps = 1e-8

    def __init__(self, parameters: Sequence[nn.Parameter], weight_decay: float, max_grad_norm: float) -> None:
        self.parameters = list(parameters)
        self.weight_decay = weight_decay
        self.max_grad_norm = max_grad_norm
        alike = defaultdict[tuple[int, ...], list[nn.Parameter]](list)
        for parameter in self.parameters:
            alike[tuple(parameter.shape)].append(parameter)
        self.groups = [Alike.of(part) for members in alike.values() for part in _parts(members)]
        self.steps = torch.zeros(len(self.parameters[0]), device=self.parameters[0].device, dtype=torch.float64)

    @torch.no_grad()
    def step(self, lr: Float[Tensor, " k"], active: Bool[Tensor, " k"]) -> None:
        """One step for the active clients; gradients are cleared for all.

        Raises:
            RuntimeError: A trainable tensor got no gradient, which means a base layer cut the graph.
        """
        if any(p.grad is None for p in self.parameters):
            raise RuntimeError("an adapter got no gradient: the base model's layers do not pass gradients through")
        self.steps += active
        clip = self.clip_factors()
        for group in self.groups:
            self._update(group, clip, lr, active)
            for parameter in group.members:
                parameter.grad = None

    def clip_factors(self) -> Float[Tensor, " k"]:
        """min(1, limit / ‖g_k‖), the rule of ``torch.nn.utils.clip_grad_norm_``, one norm per client."""
        squares = [group.grad().flatten(2).double().square().sum(2) for group in self.groups]
        norms = torch.cat(squares).sum(0).sqrt()
        return (self.max_grad_norm / (norms + 1e-6)).clamp(max=1)

    def _update(self, group: Alike, clip: Tensor, lr: Tensor, active: Tensor) -> None:
        def column(values: Tensor) -> Tensor:
            shaped = values.view(-1, *[1] * (group.values.dim() - 2))
            return shaped.to(group.values.dtype) if values.is_floating_point() else shaped

        grad = group.grad() * column(clip)
        beta1, beta2 = self.betas
        m = group.first.lerp(grad, 1 - beta1)
        v = group.second * beta2 + grad.square() * (1 - beta2)
        corrected = column((1 - beta2**self.steps).sqrt())
        denominator = v.sqrt() / corrected + self.eps
        decayed = group.values * (1 - column(lr) * self.weight_decay)
        moved = decayed - column(lr / (1 - beta1**self.steps)) * m / denominator
        for old, new in ((group.values, moved), (group.first, m), (group.second, v)):
            old.copy_(torch.where(column(active), new, old))


@dataclass(frozen=True)
class Alike:
    """Parameters of one shape, moved together.

    Attributes:
        members: The p parameters; what they hold are parts of ``values``.
        values: ``[p, k, …]``.
        first, second: Moments, likewise.
    """

    members: list[nn.Parameter]
    values: Float[Tensor, "p k ..."]
    first: Float[Tensor, "p k ..."]
    second: Float[Tensor, "p k ..."]

    @classmethod
    def of(cls, members: list[nn.Parameter]) -> Alike:
        """Move parameters next to each other."""
        values = torch.stack([parameter.detach() for parameter in members])
        for parameter, value in zip(members, values, strict=True):
            parameter.data = value
        return cls(members, values, torch.zeros_like(values), torch.zeros_like(values))

    def grad(self) -> Float[Tensor, "p k ..."]:
        """Their gradients."""
        grads = [_grad(parameter) for parameter in self.members]
        return grads[0][None] if len(grads) == 1 else torch.stack(grads)


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _parts(members: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    size = max(1, _TOGETHER[members[0].device.type] // members[0].numel())
    return [members[start : start + size] for start in range(0, len(members), size)]
