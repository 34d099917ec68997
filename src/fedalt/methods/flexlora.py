"""FlexLoRA: the exact mean of products, decomposed for each client's rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedalt.methods.algebra import truncated
from fedalt.methods.base import Gathered, Message
from fedalt.methods.unequal import Unequal
from fedalt.names import GLOBAL, A, B, Key
from fedalt.registry import METHODS


@METHODS.register("flexlora")
class FlexLoRA(Unequal):
    """Clients of unequal ranks: the server decomposes the exact mean of products for the rank of each (Bai et al.).

    Σ p_k B_k A_k = U Σ Vᵀ,   B_j = U_r Σ_r,   A_j = V_rᵀ
    """

    title = "FlexLoRA"
    source = "NeurIPS 2024, arXiv 2402.11505"

    def client_messages(self, gathered: Gathered) -> Callable[[int, int], Message]:
        """The best approximation of the client's rank."""
        layers = gathered.factors(GLOBAL)
        bests = {module: truncated(parts) for module, parts in layers.items()}
        shares = gathered.shares()

        def answer(client: int, last: int) -> Message:
            tensors: dict[Key, Tensor] = {}
            for module, best in bests.items():
                a, b = best(shares, self.rank_of(client))
                roots = b.norm(dim=0)  # both factors hold the roots of the singular values
                tensors[Key(module, GLOBAL, A)] = torch.where(roots[:, None] > 0, a / roots[:, None], 0).float()
                tensors[Key(module, GLOBAL, B)] = (b * roots).float()
            return Message(tensors)

        return answer
