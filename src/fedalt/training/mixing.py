"""What the mixer does: its weights on some prompts, and their mean per client and layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedalt.data.encode import Input, laid_out
from fedalt.model.adapted import AdaptedModel
from fedalt.model.rowmap import MixerProbe, RowMap


@dataclass(frozen=True)
class MixerWeights:
    """Mixer weights of a cohort's prompts, one after another.

    Attributes:
        layers: Layer path → α ``[t, m]``, in the order of the slots.
        owners: Stack index of the client of every token.
    """

    layers: dict[str, Float[Tensor, "t m"]]
    owners: Int[Tensor, " t"]

    @classmethod
    def of(cls, probe: MixerProbe, rows: RowMap) -> MixerWeights:
        """What a probe saw while these rows were read."""
        layers = {path: alpha.float().cpu() for path, alpha in probe.weights.items()}
        return cls(layers, torch.repeat_interleave(torch.arange(len(rows.sizes)), torch.tensor(rows.client_tokens)))

    def means(self, slot: int, clients: int) -> list[list[float]]:
        """Mean weight of one slot per client (outer) and layer (inner), over tokens."""
        tokens = torch.bincount(self.owners, minlength=clients)
        columns = [
            torch.zeros(clients).index_add(0, self.owners, alpha[:, slot]) / tokens for alpha in self.layers.values()
        ]
        means: list[list[float]] = torch.stack(columns, 1).tolist()
        return means


@torch.no_grad()
def mixer_weights(model: AdaptedModel, inputs: Sequence[Sequence[Input]]) -> MixerWeights:
    """Read the mixers of the clients on the model while they look at some texts or images of each."""
    flat = [value for mine in inputs for value in mine]
    rows = RowMap(tuple(map(len, inputs)), tuple(map(len, flat)))
    probe = MixerProbe()
    model.hidden(laid_out(flat).to(model.device), rows, probe=probe)
    return MixerWeights.of(probe, rows)
