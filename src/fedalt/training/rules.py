"""How one step of a cohort is taken, once the adapters are on the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fedalt.errors import UserError
from fedalt.names import Key
from fedalt.training.optimizer import StackedAdamW

Losses = Callable[[], Float[Tensor, " k"]]
"""Computes every client's loss on the step's rows, with the adapters as they are now."""
Trainable = Mapping[Key, nn.Parameter]
Penalty = Callable[[Trainable], Float[Tensor, " k"] | None]
"""Adds to each client's loss something of what trains, or nothing."""


class Rule(Protocol):
    """A way to take a step."""

    def by_optimizer(self, key: Key) -> bool:
        """Whether AdamW moves this tensor."""

    def with_penalty(self, penalty: Penalty) -> Rule:
        """The same with something added to every client's loss.

        Raises:
            UserError: This rule knows no penalty.
        """

    def __call__(
        self,
        losses: Losses,
        trainable: Trainable,
        optimizer: StackedAdamW,
        lr: Float[Tensor, " k"],
        active: Bool[Tensor, " k"],
    ) -> Float[Tensor, " k"]:
        """Take a step for the active clients; the losses before it."""


@dataclass(frozen=True)
class Plain:
    """Backward and AdamW.

    Attributes:
        penalty: Added to every client's loss, if there is one.
    """

    penalty: Penalty | None = None

    def with_penalty(self, penalty: Penalty) -> Rule:
        """With the penalty."""
        return Plain(penalty)

    def by_optimizer(self, key: Key) -> bool:
        """Everything."""
        return True

    def __call__(
        self, losses: Losses, trainable: Trainable, optimizer: StackedAdamW, lr: Tensor, active: Tensor
    ) -> Tensor:
        """One backward pass."""
        values = losses()
        total = values.sum()
        if self.penalty is not None and (added := self.penalty(trainable)) is not None:
            total = total + added.sum()
        total.backward()
        optimizer.step(lr, active)
        return values.detach()


PLAIN = Plain()


@dataclass(frozen=True)
class Bilevel:
    """A step of SGD on the lower tensors y, then one of AdamW on the upper ones x, looking through the first.

        y⁺ = y − β ∇_y f(x, y),   g = ∇_x f(x, y⁺) − β ∇²_xy f(x, y) ∇_y f(x, y⁺),   x ← AdamW(x, g),   y ← y⁺

    The second term, dropped unless ``unrolled``, is a product of the Hessian with v = ∇_y f(x, y⁺), found as in DARTS
    (Liu et al., ICLR 2019) by a central difference, which takes no second derivative of the model:

        ∇²_xy f(x, y) v ≈ [∇_x f(x, y + εv) − ∇_x f(x, y − εv)] / 2ε,   ε = ``reach`` / ‖v‖ for every client

    Attributes:
        lower: Slot of y.
        lr: β, or nothing for ``factor`` times the learning rate of x at that step.
        unrolled: Whether the second term is there: four backward passes in place of two.
        reach: Length of εv.
        factor: See ``lr``.
    """

    lower: str
    lr: float | None = None
    unrolled: bool = False
    reach: float = 1e-2
    factor: float = 1.0

    def with_penalty(self, penalty: Penalty) -> Rule:
        """Not known for two levels."""
        raise UserError(
            "penalty: a method that trains on two levels (Bilevel) has none; put it into the loss of a phase"
        )

    def by_optimizer(self, key: Key) -> bool:
        """The upper tensors."""
        return key.slot != self.lower

    def __call__(
        self, losses: Losses, trainable: Trainable, optimizer: StackedAdamW, lr: Tensor, active: Tensor
    ) -> Tensor:
        """Two or four backward passes on the same rows."""
        x = [value for key, value in trainable.items() if key.slot != self.lower]
        y = [value for key, value in trainable.items() if key.slot == self.lower]
        beta = (self.factor * lr if self.lr is None else torch.full_like(lr, self.lr)) * active
        values = losses()
        slopes = torch.autograd.grad(values.sum(), y)
        before = [value.detach().clone() for value in y]
        after = [value - _column(beta, value) * slope for value, slope in zip(before, slopes, strict=True)]
        _set(y, after)
        grads = torch.autograd.grad(losses().sum(), [*x, *y])
        upper, v = list(grads[: len(x)]), grads[len(x) :]
        if self.unrolled:
            size = torch.stack([value.flatten(1).square().sum(1) for value in v]).sum(0).sqrt()
            epsilon = self.reach / size.clamp(min=torch.finfo(size.dtype).tiny)
            ends = []
            for sign in (1, -1):
                _set(y, [b + sign * _column(epsilon, b) * part for b, part in zip(before, v, strict=True)])
                ends.append(torch.autograd.grad(losses().sum(), x))
            for i, (plus, minus) in enumerate(zip(*ends, strict=True)):
                curved = _column(beta / (2 * epsilon), plus) * (plus - minus)
                upper[i] = upper[i] - torch.where(_column(size, curved) > 0, curved, 0)
            _set(y, after)
        for value, grad in zip(x, upper, strict=True):
            value.grad = grad
        optimizer.step(lr, active)
        return values.detach()


def _column(values: Float[Tensor, " k"], like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


@torch.no_grad()
def _set(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
