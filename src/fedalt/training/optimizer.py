"""Optimisers over stacked clients, and the rules by which one step of a cohort is taken."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fedalt.config import TrainingConfig
from fedalt.errors import UserError
from fedalt.names import Key, Tensors

_TOGETHER = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Numbers that are moved together: a CPU keeps a megabyte near by, a GPU waits for every launch."""


def columns(values: Float[Tensor, " k"], like: Float[Tensor, "k ..."]) -> Tensor:
    """One number per client, to go with a tensor of them all."""
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


class Stacked(ABC):
    """An optimiser of tensors ``[k, …]`` as if each of the k slices had one of its own.

    Per client, the gradient is clipped to ``max_grad_norm`` over all of its tensors. A client that is not active in a
    step keeps its parameters, its moments and its step counts bit for bit.
    """

    moments: ClassVar[tuple[str, ...]]
    """What is remembered of every parameter, besides its step count."""

    def __init__(self, parameters: Sequence[nn.Parameter], weight_decay: float, max_grad_norm: float) -> None:
        self.parameters = list(parameters)
        self.weight_decay = weight_decay
        self.max_grad_norm = max_grad_norm
        alike = defaultdict[tuple[int, ...], list[nn.Parameter]](list)
        for parameter in self.parameters:
            alike[tuple(parameter.shape)].append(parameter)
        parts = [part for members in alike.values() for part in _parts(members)]
        self.groups = [Alike.of(part, len(self.moments)) for part in parts]

    @torch.no_grad()
    def step(self, lr: Float[Tensor, " k"], active: Bool[Tensor, " k"]) -> None:
        """One step for the active clients; gradients are cleared for all.

        Raises:
            RuntimeError: A trainable tensor got no gradient, which means a base layer cut the graph.
        """
        if any(p.grad is None for p in self.parameters):
            raise RuntimeError("an adapter got no gradient: the base model's layers do not pass gradients through")
        clip = self.clip_factors()
        for group in self.groups:
            group.steps.add_(active)
            moved = self.moved(group, group.grad() * group.column(clip), lr)
            for old, new in zip((group.values, *group.moments), moved, strict=True):
                old.copy_(torch.where(group.column(active), new, old))
            for parameter in group.members:
                parameter.grad = None

    def clip_factors(self) -> Float[Tensor, " k"]:
        """min(1, limit / ‖g_k‖), the rule of ``torch.nn.utils.clip_grad_norm_``, one norm per client."""
        squares = [group.grad().flatten(2).double().square().sum(2) for group in self.groups]
        norms = torch.cat(squares).sum(0).sqrt()
        return (self.max_grad_norm / (norms + 1e-6)).clamp(max=1)

    @abstractmethod
    def moved(self, group: Alike, grad: Float[Tensor, "p k ..."], lr: Float[Tensor, " k"]) -> tuple[Tensor, ...]:
        """The group's values after a step of every client, and its moments."""

    def memory(self, parameter: nn.Parameter) -> dict[str, Float[Tensor, "k ..."]]:
        """What is remembered of a parameter, by name: its own storage, to be read or written."""
        group, at = next((g, i) for g in self.groups for i, member in enumerate(g.members) if member is parameter)
        return {**{name: m[at] for name, m in zip(self.moments, group.moments, strict=True)}, STEPS: group.steps[at]}


STEPS = "steps"


class StackedAdamW(Stacked):
    """AdamW.

        m ← β1 m + (1−β1) g,   v ← β2 v + (1−β2) g²,   p ← p − lr·(wd·p + m̂ / (√v̂ + ε))

    β = (.9, .999) and ε = 1e-8, as in the paper's code, unless given.
    """

    moments = ("first", "second")

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        weight_decay: float,
        max_grad_norm: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, weight_decay, max_grad_norm)
        self.betas, self.eps = betas, eps

    def moved(self, group: Alike, grad: Tensor, lr: Tensor) -> tuple[Tensor, ...]:
        """A step of AdamW."""
        column, (beta1, beta2), steps = group.column, self.betas, group.steps
        m = group.moments[0].lerp(grad, 1 - beta1)
        v = group.moments[1] * beta2 + grad.square() * (1 - beta2)
        denominator = v.sqrt() / column((1 - beta2**steps).sqrt()) + self.eps
        decayed = group.values * (1 - column(lr) * self.weight_decay)
        return decayed - column(lr / (1 - beta1**steps)) * m / denominator, m, v


class StackedSGD(Stacked):
    """SGD with momentum, as torch has it: g ← g + wd·p, m ← μ m + g, p ← p − lr·m."""

    moments = ("first",)

    def __init__(
        self, parameters: Sequence[nn.Parameter], weight_decay: float, max_grad_norm: float, momentum: float = 0.0
    ) -> None:
        super().__init__(parameters, weight_decay, max_grad_norm)
        self.momentum = momentum

    def moved(self, group: Alike, grad: Tensor, lr: Tensor) -> tuple[Tensor, ...]:
        """A step of SGD."""
        m = self.momentum * group.moments[0] + (grad + self.weight_decay * group.values)
        return group.values - group.column(lr) * m, m


def optimizer_of(config: TrainingConfig, parameters: Sequence[nn.Parameter]) -> Stacked:
    """The optimiser that the settings name."""
    common = (parameters, config.weight_decay, config.max_grad_norm)
    if config.optimizer == "sgd":
        return StackedSGD(*common, config.momentum)
    return StackedAdamW(*common, config.betas, config.eps)


Trainable = Mapping[Key, nn.Parameter]
Memory = Mapping[str, Tensors]
"""What one client's optimiser remembers: the name of a moment → tensor of every key; empty before the first step."""


def recall(optimizer: Stacked, moved: Trainable, memories: Sequence[Memory]) -> None:
    """Put the clients' optimisers back to where they were; what one has never moved starts at zero."""
    for key, parameter in moved.items():
        for name, value in optimizer.memory(parameter).items():
            for mine, memory in zip(value, memories, strict=True):
                if key in memory.get(name, {}):
                    mine.copy_(memory[name][key])


def remember(optimizer: Stacked, moved: Trainable, memories: Sequence[Memory]) -> list[Memory]:
    """Each client's memory with what its optimiser knows now of the tensors that it moves, on the CPU."""
    new: list[dict[str, dict[Key, Tensor]]] = [{name: dict(part) for name, part in old.items()} for old in memories]
    for key, parameter in moved.items():
        for name, value in optimizer.memory(parameter).items():
            for memory, mine in zip(new, value.cpu(), strict=True):
                memory.setdefault(name, {})[key] = mine.clone()
    return list(new)


@dataclass(frozen=True)
class Alike:
    """Parameters of one shape, moved together.

    Attributes:
        members: The p parameters; what they hold are parts of ``values``.
        values: ``[p, k, …]``.
        moments: Likewise.
        steps: Steps that each client has taken with each of them.
    """

    members: list[nn.Parameter]
    values: Float[Tensor, "p k ..."]
    moments: tuple[Float[Tensor, "p k ..."], ...]
    steps: Float[Tensor, "p k"]

    @classmethod
    def of(cls, members: list[nn.Parameter], moments: int) -> Alike:
        """Move parameters next to each other."""
        values = torch.stack([parameter.detach() for parameter in members])
        for parameter, value in zip(members, values, strict=True):
            parameter.data = value
        steps = torch.zeros(values.shape[:2], device=values.device, dtype=torch.float64)
        return cls(members, values, tuple(torch.zeros_like(values) for _ in range(moments)), steps)

    def column(self, values: Float[Tensor, "*p k"]) -> Tensor:
        """One number per client, or per parameter and client, to go with ``values``."""
        shaped = values.view(*values.shape, *[1] * (self.values.dim() - 2))
        return shaped.to(self.values.dtype) if values.is_floating_point() else shaped

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
Penalty = Callable[[Trainable], Float[Tensor, " k"] | None]
"""Adds to each client's loss something of what trains, or nothing."""


class Rule(Protocol):
    """A way to take a step."""

    def by_optimizer(self, key: Key) -> bool:
        """Whether the optimiser moves this tensor."""

    def with_penalty(self, penalty: Penalty) -> Rule:
        """The same with something added to every client's loss."""

    def __call__(
        self,
        losses: Losses,
        trainable: Trainable,
        optimizer: Stacked,
        lr: Float[Tensor, " k"],
        active: Bool[Tensor, " k"],
    ) -> Float[Tensor, " k"]:
        """Take a step for the active clients; the losses before it."""


@dataclass(frozen=True)
class Plain:
    """Backward and a step of the optimiser.

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

    def __call__(self, losses: Losses, trainable: Trainable, optimizer: Stacked, lr: Tensor, active: Tensor) -> Tensor:
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
    """A step of SGD on the lower tensors y, then one of the optimiser on the upper ones x, looking through the first.

        y⁺ = y − β ∇_y f(x, y),   g = ∇_x f(x, y⁺) − β ∇²_xy f(x, y) ∇_y f(x, y⁺),   x ← AdamW(x, g),   y ← y⁺

    The second term, dropped unless ``unrolled``, is a product of the Hessian with v = ∇_y f(x, y⁺), found as in DARTS
    (Liu et al., ICLR 2019) by a central difference: losses keep gradients and no graph, and the fast layers have no
    second derivative. On a small Llama in fp32 the term is off by 1e-4 of its length.

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
    reach: float = 3e-3
    factor: float = 1.0

    def with_penalty(self, penalty: Penalty) -> Rule:
        """Not known for two levels."""
        raise UserError(
            "penalty: a method that trains on two levels (Bilevel) has none; put it into the loss of a phase"
        )

    def by_optimizer(self, key: Key) -> bool:
        """The upper tensors."""
        return key.slot != self.lower

    def __call__(self, losses: Losses, trainable: Trainable, optimizer: Stacked, lr: Tensor, active: Tensor) -> Tensor:
        """Two or four backward passes on the same rows."""
        x = [value for key, value in trainable.items() if key.slot != self.lower]
        y = [value for key, value in trainable.items() if key.slot == self.lower]
        beta = (self.factor * lr if self.lr is None else torch.full_like(lr, self.lr)) * active
        values = losses()
        slopes = torch.autograd.grad(values.sum(), y)
        before = [value.detach().clone() for value in y]
        after = [value - columns(beta, value) * slope for value, slope in zip(before, slopes, strict=True)]
        _set(y, after)
        grads = torch.autograd.grad(losses().sum(), [*x, *y])
        upper, v = list(grads[: len(x)]), grads[len(x) :]
        if self.unrolled:
            size = torch.stack([value.flatten(1).square().sum(1) for value in v]).sum(0).sqrt()
            epsilon = self.reach / size.clamp(min=torch.finfo(size.dtype).tiny)
            ends = []
            for sign in (1, -1):
                _set(y, [b + sign * columns(epsilon, b) * part for b, part in zip(before, v, strict=True)])
                ends.append(torch.autograd.grad(losses().sum(), x))
            for i, (plus, minus) in enumerate(zip(*ends, strict=True)):
                curved = columns(beta / (2 * epsilon), plus) * (plus - minus)
                upper[i] = upper[i] - torch.where(columns(size, curved) > 0, curved, 0)
            _set(y, after)
        for value, grad in zip(x, upper, strict=True):
            value.grad = grad
        optimizer.step(lr, active)
        return values.detach()


@torch.no_grad()
def _set(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
