"""AdamW over stacked clients: every client has its own step count, learning rate and clipping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


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
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
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
        for parameter, first, second in zip(self.parameters, self.first, self.second, strict=True):
            self._update(parameter, first, second, clip, lr, active)
            parameter.grad = None

    def clip_factors(self) -> Float[Tensor, " k"]:
        """min(1, limit / ‖g_k‖), the rule of ``torch.nn.utils.clip_grad_norm_``, one norm per client."""
        squares = [_grad(p).flatten(1).double().square().sum(1) for p in self.parameters]
        norms = torch.stack(squares).sum(0).sqrt()
        return (self.max_grad_norm / (norms + 1e-6)).clamp(max=1)

    def _update(
        self, parameter: nn.Parameter, first: Tensor, second: Tensor, clip: Tensor, lr: Tensor, active: Tensor
    ) -> None:
        def column(values: Tensor) -> Tensor:
            shaped = values.view(-1, *[1] * (parameter.dim() - 1))
            return shaped.to(parameter.dtype) if values.is_floating_point() else shaped

        grad = _grad(parameter) * column(clip)
        beta1, beta2 = self.betas
        m = first.lerp(grad, 1 - beta1)
        v = second * beta2 + grad.square() * (1 - beta2)
        corrected = column((1 - beta2**self.steps).sqrt())
        denominator = v.sqrt() / corrected + self.eps
        decayed = parameter * (1 - column(lr) * self.weight_decay)
        moved = decayed - column(lr / (1 - beta1**self.steps)) * m / denominator
        for old, new in ((parameter, moved), (first, m), (second, v)):
            old.copy_(torch.where(column(active), new, old))


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
