"""FedEx-LoRA: FedIT, and what the product of means lacks merged into everybody's base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fedalt.methods.algebra import Factors, Weighted, factor_means, mean_of
from fedalt.methods.base import Gathered, Message, Method
from fedalt.methods.flora import merged
from fedalt.model.state import AdapterShape, ClientState
from fedalt.names import GLOBAL, A, B, Key, Tensors
from fedalt.registry import METHODS


@METHODS.register("fedex_lora")
class FedExLoRA(Method):
    """Everybody starts from the mean of A and the mean of B; the residual of their product goes into the base.

        W0' = W0 + s (Σ_k p_k B_k A_k − B̄ Ā),   so that W0' + s B̄ Ā = W0 + s Σ_k p_k B_k A_k exactly

    A ``[r, d_in]``, B ``[d_out, r]``. Singhal et al., ACL 2025, arXiv 2410.09432, and its code. The residual has a rank
    of at most (n − 1)·r for n uploads, and is sent as factors of that rank; as Σ p_k (B_k − B̄) = 0, for any client j

        Σ_k p_k B_k A_k − B̄ Ā = Σ_{k≠j} p_k (B_k − B̄)(A_k − A_j)

    The paper weighs clients evenly; here p_k is by rows, unless ``federation.weighting`` says otherwise. Its truncated
    residual, by an SVD, is left out. What is merged is kept beside the base, dense and for each client, as in FLoRA;
    the message has all residuals that an absent client has missed.
    """

    title = "FedEx-LoRA"
    source = "ACL 2025, arXiv 2410.09432"
    needs_uploads = True
    has_server_state = True

    @property
    def shape(self) -> AdapterShape:
        """With room for what is merged."""
        return replace(super().shape, merged=True)

    def server_update(self, gathered: Gathered) -> Tensors:
        """Remember the means, and this round's residual; one upload leaves none."""
        shares, memory = gathered.shares(), {**gathered.memory, **mean_of(gathered.uploads, gathered.weights)}
        for module, mine in gathered.factors(GLOBAL).items() if len(shares) > 1 else ():
            a, b = residual([(*mine[client], share) for client, share in shares.items()])
            slot = f"round{gathered.round}"
            memory[Key(module, slot, A)], memory[Key(module, slot, B)] = a.float(), b.float()
        return memory

    def client_messages(self, gathered: Gathered) -> Callable[[int, int], Message]:
        """The means, and all residuals since the client last took part."""
        rounds = {key: int(key.slot.removeprefix("round")) for key in gathered.memory if key.slot != GLOBAL}

        def answer(client: int, last: int) -> Message:
            return Message({key: value for key, value in gathered.memory.items() if rounds.get(key, last) >= last})

        return answer

    def receive(self, state: ClientState, message: Message) -> ClientState:
        """A, B ← Ā, B̄, and merge the residuals."""
        means = {key: value for key, value in message.tensors.items() if key.slot == GLOBAL}
        rest = {key: value for key, value in message.tensors.items() if key.slot != GLOBAL}
        return state.with_tensors({**means, **merged(state, rest)})


def residual(parts: list[Weighted]) -> Factors:
    """Σ p B A − B̄ Ā of one layer as A ``[(n−1)·r, d_in]`` and B ``[d_out, (n−1)·r]``, in fp64."""
    _, mean = factor_means(parts)
    (first, _, _), *others = parts
    a = torch.cat([a.double() - first.double() for a, _, _ in others])
    return a, torch.cat([p * (b.double() - mean) for _, b, p in others], 1)
