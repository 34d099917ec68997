"""AdamW over stacked clients, and the rules by which one step of a cohort is taken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fedalt.errors import UserError
from fedalt.names import Key

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
