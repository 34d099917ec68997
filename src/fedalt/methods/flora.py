"""FLoRA: stacks of all LoRAs, merged into everybody's base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fedalt.methods.algebra import stacked
from fedalt.methods.base import Gathered, Message
from fedalt.methods.unequal import Unequal
from fedalt.model.state import AdapterShape, ClientState, drawn
from fedalt.names import GLOBAL, MERGED, A, B, Key, Tensors, W
from fedalt.registry import METHODS
from fedalt.seeding import rng


@METHODS.register("flora")
class FLoRA(Unequal):
    """Clients of unequal ranks: everybody merges the stack of all LoRAs into its base (Wang et al.).

        A = [p_1 A_1; …; p_n A_n],   B = [B_1, …, B_n],   W0 ← W0 + s B A,   B A = Σ p_k B_k A_k

    A new LoRA starts on the new base: A random, B zero. The merged part is kept beside the frozen base, dense and for
    each client, so that quantised bases and other methods are not disturbed; the message is the stack, or all stacks
    that an absent client has missed.
    """

    title = "FLoRA"
    source = "NeurIPS 2024, arXiv 2409.05976"
    has_server_state = True

    @property
    def shape(self) -> AdapterShape:
        """With room for what is merged."""
        return replace(super().shape, merged=True)

    def server_update(self, gathered: Gathered) -> Tensors:
        """Remember this round's stack."""
        shares, memory = gathered.shares(), dict(gathered.memory)
        for module, parts in gathered.factors(GLOBAL).items():
            a, b = stacked([(*parts[c], share) for c, share in shares.items()])
            memory[Key(module, f"round{gathered.round}", A)] = a
            memory[Key(module, f"round{gathered.round}", B)] = b
        return memory

    def client_messages(self, gathered: Gathered) -> Callable[[int, int], Message]:
        """All stacks since the client last took part."""
        rounds = {key: int(key.slot.removeprefix("round")) for key in gathered.memory}

        def answer(client: int, last: int) -> Message:
            return Message({key: value for key, value in gathered.memory.items() if rounds[key] >= last})

        return answer

    def receive(self, state: ClientState, message: Message) -> ClientState:
        """Merge, and start a new LoRA."""
        changes = merged(state, message.tensors)
        rank, seed = self.rank_of(state.client), self.config.seed
        for key, old in state.tensors.items():
            if key.slot == GLOBAL:
                changes[key] = torch.zeros_like(old)
                if key.factor == A:
                    own = rng(seed, "init", state.round, state.client, key.module)
                    gaussian = self.config.lora.distribution == "gaussian"
                    changes[key][:rank] = drawn(rank, old.shape[1], own, rank if gaussian else None)
        return replace(state.with_tensors(changes), optimizer={})  # whose moments are of a LoRA that is gone


def merged(state: ClientState, stacks: Tensors) -> dict[Key, Tensor]:
    """What is merged into a client's base, with the products of some stacks added."""
    sums: dict[Key, Tensor] = {}
    for key, a in stacks.items():
        if key.factor == A:
            place = Key(key.module, MERGED, W)
            product = stacks[key._replace(factor=B)].double() @ a.double()
            sums[place] = sums.get(place, state.tensors[place].double()) + product
    return {key: value.float() for key, value in sums.items()}
