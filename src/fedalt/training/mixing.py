"""What the mixer does: its weights on some prompts, and their mean per client and layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedalt.data.batches import Prompt, pad_prompts
from fedalt.model.adapted import AdaptedModel
from fedalt.model.rowmap import MixerProbe, RowMap


@dataclass(frozen=True)
class MixerWeights:
    """Mixer weights of a cohort's prompts.

    Attributes:
        layers: Layer path → α ``[n, t, m]``, in the order of the slots.
        mask: 1 where a token stands.
        owners: Stack index of the client of every row.
    """

    layers: dict[str, Float[Tensor, "n t m"]]
    mask: Int[Tensor, "n t"]
    owners: Int[Tensor, " n"]

    def means(self, slot: int, clients: int) -> list[list[float]]:
        """Mean weight of one slot per client (outer) and layer (inner), over tokens."""
        tokens = torch.zeros(clients).index_add(0, self.owners, self.mask.sum(1).float())
        columns = [
            torch.zeros(clients).index_add(0, self.owners, (alpha[..., slot] * self.mask).sum(1)) / tokens
            for alpha in self.layers.values()
        ]
        means: list[list[float]] = torch.stack(columns, 1).tolist()
        return means


@torch.no_grad()
def mixer_weights(model: AdaptedModel, prompts: Sequence[Sequence[Prompt]], pad: int) -> MixerWeights:
    """Read the mixers of the clients on the model while they look at some prompts of each."""
    rows = RowMap(tuple(map(len, prompts)))
    ids, mask = pad_prompts([prompt for mine in prompts for prompt in mine], pad, left=False)
    probe = MixerProbe()
    with model.rows(rows, probe):
        model.base(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    layers = {path: alpha.float().cpu() for path, alpha in probe.weights.items()}
    return MixerWeights(layers, mask, rows.owners(len(mask), mask.device))
