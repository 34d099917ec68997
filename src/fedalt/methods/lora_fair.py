"""LoRA-FAIR: FedIT with B corrected on the server so that the product of means is closer to the mean of products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fedalt.config.section import Section, Span
from fedalt.methods.algebra import Factors, Weighted, factor_means, fit_b, norm, onto, stacked
from fedalt.methods.base import Gathered, Message, Method
from fedalt.names import GLOBAL, A, B, Key
from fedalt.registry import METHODS


@METHODS.register("lora_fair")
class LoRAFair(Method):
    """Everybody starts from Ā and B̄ + ΔB; the server finds the correction ΔB layer by layer (Bian et al.).

        ΔB = argmin of 1 − cos⟨Σ p_k B_k A_k, (B̄ + ΔB) Ā⟩ + λ ‖ΔB‖

    by gradient descent from zero. The cosine does not see the size of the product; ``lora_fair.solver=ridge`` fits
    in least squares instead (``products.fit_b``). Steps and step size could not be checked against the paper.
    """

    class Settings(Section):
        """LoRA-FAIR."""

        solver: Literal["sgd", "ridge"] = Field(
            "sgd", description="cosine by gradient descent (paper), or least squares"
        )
        weight: Annotated[float, Span(0.001, 1)] = Field(0.01, ge=0, description="weight of the correction's size")
        lr: float = Field(0.01, gt=0, description="sgd: learning rate")
        steps: int = Field(1000, ge=1, description="sgd: steps")

    settings: Settings

    title = "LoRA-FAIR"
    source = "ICCV 2025"
    needs_uploads = True

    def client_messages(self, gathered: Gathered) -> Callable[[int, int], Message]:
        """The corrected mean, for everybody."""
        shares = gathered.shares()
        ridge = self.settings.solver == "ridge"
        tensors: dict[Key, Tensor] = {}
        for module, mine in gathered.factors(GLOBAL).items():
            parts = [(*mine[client], share) for client, share in shares.items()]
            a, b = fit_b(parts, self.settings.weight) if ridge else descend(parts, self.settings)
            tensors |= {Key(module, GLOBAL, A): a.float(), Key(module, GLOBAL, B): b.float()}
        message = Message(tensors)
        return lambda client, last: message


def descend(parts: list[Weighted], options: LoRAFair.Settings) -> Factors:
    """Gradient descent on the cosine, from r × r products alone.

    The norm, which has no slope at zero, takes its part as a proximal step: ΔB ← ΔB max(0, 1 − ηλ/‖ΔB‖).
    With T = P Āᵀ, M = Ā Āᵀ and C = B̄ + ΔB: ⟨P, C Ā⟩ = ⟨T, C⟩ and ‖C Ā‖² = ⟨C M, C⟩.
    """
    a, mean = factor_means(parts)
    gram: Float[Tensor, "r r"] = a @ a.T
    target = onto(parts, a)
    length = norm(*stacked(parts))
    if length == 0 or not (mean @ gram * mean).sum() > 0:
        return a, mean
    delta, tiny = torch.zeros_like(mean), torch.finfo(mean.dtype).tiny
    pull = options.lr * options.weight
    for _ in range(options.steps):
        c = mean + delta
        reach = c @ gram
        own = (reach * c).sum().clamp(min=tiny).sqrt()
        cosine = (target * c).sum() / (length * own)
        slope = -(target / length - cosine * reach / own) / own
        delta = delta - options.lr * slope
        delta = delta * (1 - pull / delta.norm().clamp(min=max(pull, tiny)))
    return a, mean + delta
