"""FedRot-LoRA: FedIT whose clients turn their factors towards the last mean before these are averaged."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from fedalt.config.section import Section
from fedalt.methods.algebra import Factors
from fedalt.methods.base import Method
from fedalt.model.state import ClientState
from fedalt.names import GLOBAL, A, B, Key
from fedalt.registry import METHODS


@METHODS.register("fedrot_lora")
class FedRotLoRA(Method):
    """Every client turns its factors towards the last mean before the server averages them as in FedIT.

    A LoRA is the same after an orthogonal R, (B Rᵀ)(R A) = B A, but the means of factors are not. After training,
    client k replaces A_k and B_k by R_k A_k and B_k R_kᵀ, layer by layer, with

        R_k = argmin over RᵀR = I of ‖R A_k − Ā‖² + ‖B_k Rᵀ − B̄‖² = U Vᵀ,   U Σ Vᵀ = Ā A_kᵀ + B̄ᵀ B_k   [r, r]

    where (Ā, B̄) is what the client started the round from, the last mean that was broadcast (orthogonal Procrustes, by
    an SVD in fp64). Nothing more is sent than in FedIT; the server averages A and B as ever.

    Which factors the paper fits could not be checked here: ``fedrot_lora.fit`` has both, one of them, or A in odd and
    B in even rounds. Where the matrix is zero, as for B in the first round, every R is as good, and nothing turns.
    """

    class Settings(Section):
        """FedRot-LoRA."""

        fit: Literal["both", "A", "B", "alternate"] = Field(
            "both", description="factors that are turned towards the last mean: both, one, or A and B in turn"
        )

    settings: Settings

    title = "FedRot-LoRA"
    source = "arXiv 2602.23638"

    def after_training(self, state: ClientState, began: ClientState, round_: int) -> ClientState:
        """(A, B) ← (R A, B Rᵀ) in every layer."""
        turned: dict[Key, Tensor] = {}
        for key, a in state.tensors.items():
            if (key.slot, key.factor) == (GLOBAL, A):
                other = key._replace(factor=B)
                mine = a.double(), state.tensors[other].double()
                r = self.rotation(mine, (began.tensors[key].double(), began.tensors[other].double()), round_)
                turned[key], turned[other] = (r @ mine[0]).float(), (mine[1] @ r.T).float()
        return state.with_tensors(turned)

    def rotation(self, mine: Factors, mean: Factors, round_: int) -> Float[Tensor, "r r"]:
        """R of one layer, in fp64."""
        fit = self.settings.fit if self.settings.fit != "alternate" else (B, A)[round_ % 2]
        target = torch.zeros(len(mine[0]), len(mine[0]), dtype=torch.float64)
        if fit != B:
            target = target + mean[0] @ mine[0].T
        if fit != A:
            target = target + mean[1].T @ mine[1]
        if not target.any():
            return torch.eye(len(target), dtype=torch.float64)
        u, _, v = torch.linalg.svd(target)
        rotation: Tensor = u @ v
        return rotation
