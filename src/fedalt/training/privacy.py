"""Differential privacy of single rows: clipped gradients with Gaussian noise, and what they cost (DP-SGD).

    g = 1/B [Σ_{i in the step} min(1, C/‖g_i‖) g_i + z],   z ~ N(0, (σC)² I),   every row in a step with rate q = B/n

g_i is the gradient of row i's own mean loss to *everything* that trains on the client's rows: LoRAs, mixer, head. All
of it is covered by one (ε, δ), and so is whatever is made of it (Abadi et al., CCS 2016). ``docs/adr/0012`` says why a
part that never leaves the client is not trained without noise.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from scipy.special import ndtri
from torch import Tensor

from fedalt.data.batches import Batch, Noise, Plan
from fedalt.errors import UserError, needs
from fedalt.model.adapted import AdaptedModel
from fedalt.seeding import derive_key, secret_uniform
from fedalt.training.loss import Given, row_losses
from fedalt.training.optimizer import columns

_ORDERS = (1.25, 1.5, 1.75, 2.25, 2.5, 2.75, 3.5, 4.5, *map(float, range(2, 65)), 80.0, 96.0, 128.0, 256.0, 512.0)
_LEAST, _MOST = 0.2, 1e5
"""Noise multipliers that are looked at."""


@lru_cache(maxsize=4096)
def epsilon(rate: float, multiplier: float, steps: int, delta: float) -> float:
    """ε at δ after so many steps, by Rényi differential privacy of the Poisson-subsampled Gaussian (Opacus).

    An upper bound, for adding and for removing a row (Mironov, Talwar and Zhang, 2019).
    """
    with needs("privacy", "privacy.epsilon and privacy.noise_multiplier"):
        from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
    if not steps:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an order at the end of those that are looked at, which holds as well
        spent = compute_rdp(q=rate, noise_multiplier=multiplier, steps=steps, orders=list(_ORDERS))
        return max(0.0, float(get_privacy_spent(orders=list(_ORDERS), rdp=spent, delta=delta)[0]))


@lru_cache(maxsize=4096)
def noise_multiplier(target: float, rate: float, steps: int, delta: float) -> float:
    """The least σ, to a thousandth, with which so many steps stay within ε."""
    low, high = _LEAST, _MOST
    if epsilon(rate, high, steps, delta) > target:
        raise UserError(f"privacy.epsilon: {target:g} at delta {delta:.2g} needs too much noise in {steps} steps")
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if epsilon(rate, middle, steps, delta) > target else (low, middle)
    return high


def spent(noise: Noise, steps: int) -> float:
    """ε of a client after so many steps."""
    return epsilon(noise.rate, noise.multiplier, steps, noise.delta)


def private_losses(
    model: AdaptedModel, parts: Sequence[Batch], plans: Sequence[Plan], step: int
) -> Float[Tensor, " k"]:
    """Each client's Σ of its rows' mean losses over the expected rows, whose gradient is clipped and noised."""
    named = model.trainable
    grads = [torch.zeros_like(value, dtype=torch.float64) for value in named.values()]
    values = torch.zeros(len(plans), device=model.device)
    for part in parts:
        batch = part.to(model.device)
        losses, clipped = clipped_sum(model, batch, [_noise(plan).clip for plan in plans])
        values.index_add_(0, _owners(batch), losses.to(values.dtype))
        for total, found in zip(grads, clipped, strict=True):
            total.add_(found)
    expected = torch.tensor([_noise(plan).expected for plan in plans], device=model.device)
    for k, plan in enumerate(plans):
        if step < len(plan.steps):
            for total, drawn in zip(grads, _drawn(_noise(plan), step, model), strict=True):
                total[k].add_(drawn.to(model.device))
    for total in grads:  # rounded once, after the noise
        total.div_(columns(expected.double(), total))
    made = [total.to(value.dtype) for total, value in zip(grads, named.values(), strict=True)]
    mean: Tensor = Given.apply(values / expected, made, *named.values())  # type: ignore[no-untyped-call]
    return mean


def clipped_sum(
    model: AdaptedModel, batch: Batch, clips: Sequence[float]
) -> tuple[Float[Tensor, " n"], list[Float[Tensor, "k ..."]]]:
    """Every row's mean loss, and Σ_i min(1, C/‖g_i‖) g_i of every client, for each tensor that trains.

    One forward and two backward passes: the first measures every row's gradient, layer by layer; the second is that of
    the losses weighed by their rows' factors. So whatever a step has (dropout, mixers, packed rows) it has in both.
    """
    parameters, owners = list(model.trainable.values()), _owners(batch)
    with model.context.row_norms(len(owners), model.device) as norms:
        losses = row_losses(model, batch, mean=True)
        heads = norms.apart
        found = torch.autograd.grad(losses.sum(), [*heads, *parameters], retain_graph=True, allow_unused=True)
        for i, grad in enumerate(found[: len(heads)]):
            norms.add(f"tensor {i} of the head", grad if grad is not None else torch.zeros_like(heads[i]))
        norms.asked = False
        lengths = norms.squares.sqrt()
        limits = torch.tensor(clips, dtype=lengths.dtype, device=lengths.device)[owners]
        factors = torch.where(lengths.isfinite(), (limits / lengths).clamp(max=1), 0.0)
        total = (losses * factors.to(losses.dtype)).sum()
        clipped = torch.autograd.grad(total, parameters, allow_unused=True)
    none = (torch.zeros_like(value) for value in parameters)
    return losses.detach(), [zero if grad is None else grad for grad, zero in zip(clipped, none, strict=True)]


def _drawn(noise: Noise, step: int, model: AdaptedModel) -> list[Tensor]:
    """A step's noise on the sum of one client, in fp64; the same wherever and beside whomever it trains."""
    sizes = {key: value[0].numel() for key, value in model.trainable.items()}
    order = sorted(sizes, key=str)
    uniform = secret_uniform(derive_key(noise.key, "noise", step), sum(sizes.values()))
    normal = torch.from_numpy(ndtri(uniform.numpy())) * (noise.multiplier * noise.clip)
    parts = dict(zip(order, normal.split([sizes[key] for key in order]), strict=True))
    return [parts[key].view(value.shape[1:]) for key, value in model.trainable.items()]


def _owners(batch: Batch) -> Tensor:
    """Stack index of every row's client."""
    sizes = torch.tensor(batch.rows.sizes)
    return torch.arange(len(sizes)).repeat_interleave(sizes).to(batch.inputs.device)


def _noise(plan: Plan) -> Noise:
    assert plan.noise is not None
    return plan.noise
