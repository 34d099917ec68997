"""FedALT, as the paper has it: an individual LoRA, a frozen rest-of-world LoRA, and a per-token mixer."""

from __future__ import annotations

from torch import Tensor

from fedalt.methods.base import BOTH, NONE, Message, Method, Phase, Slot
from fedalt.model.layer import SOFTMAX, SUM, Mixing
from fedalt.model.state import ClientState
from fedalt.names import INDIVIDUAL, MIXER, REST_OF_WORLD, Key, Tensors


class FedALT(Method):
    """The paper's method, §3: an individual LoRA, the frozen mean of the others', and a mixer of the two.

        y = W0 x + s · [α_L(x) B_L A_L x̃ + α_R(x) B_R A_R x̃],   (α_L, α_R) = softmax(G x)

    The client trains its individual LoRA (A_L, B_L) and its mixer G, uploads the individual LoRA alone, and never has
    it overwritten. The RoW LoRA (A_R, B_R) is frozen: the uniform mean of the *others'* individual LoRAs, factor by
    factor. The server may send everybody the same mean; the client takes itself out of it:

        A_R^k = (Ā − p_k A_L^k) / (1 − p_k),   with A_L^k exactly as the server received it

    Differences from the official code: only the individual LoRA is uploaded (the code sends everything and ignores
    the rest), the mean is broadcast, and a federation of one client has no RoW LoRA and no mixer, so it equals Local
    (the code crashes). Mixer row 0 is the individual LoRA here and the RoW LoRA in the official code.

    Registered under this name is ``FedALTVariants`` in the file beside this one, which adds the paper's ablations and
    other RoW LoRAs as settings; with the defaults it is this.
    """

    title = "FedALT"
    source = "AAAI 2026, arXiv 2503.11880"
    weighting = "uniform"
    keeps_absent = True
    leave_one_out = True

    def setup(self) -> None:
        """Two LoRAs and the mixer; one LoRA where there is nobody else."""
        self.rows: tuple[str, ...] = () if self.clients == 1 else (REST_OF_WORLD,)
        self.slots = (Slot(INDIVIDUAL), *(Slot(row, NONE) for row in self.rows))
        self.mixing = SUM if self.clients == 1 else SOFTMAX

    @property
    def frozen(self) -> tuple[str, ...]:
        """The RoW LoRA starts at zero: nobody has uploaded yet."""
        return self.rows

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """The individual LoRA and the mixer train."""
        return (Phase(self.slot_names, {INDIVIDUAL: BOTH, MIXER: frozenset("G")}, self.mixing),)

    def receive(self, state: ClientState, message: Message) -> ClientState:
        """RoW LoRA ← mean of the others. When nobody else is in the mean, it stays as it is."""
        if self.clients == 1 or message.share >= 1:
            return state
        own = state.sent if message.share > 0 else None
        return state.with_tensors(without_own(message.tensors, own, message.share))

    @property
    def newcomer(self) -> tuple[tuple[str, ...], Mixing]:
        """The RoW LoRA alone, with the weight of an even mixer, which knows nothing yet."""
        return (self.rows, Mixing("fixed", (0.5,))) if self.rows else self.inference


def without_own(mean: Tensors, own: Tensors | None, share: float) -> dict[Key, Tensor]:
    """(X̄ − p·X_k)/(1 − p) in fp64, as the RoW slot's tensors; with ``own`` absent the mean is the RoW LoRA already."""
    rest_of_world = {}
    for key, value in mean.items():
        rest = value.double() if own is None else (value.double() - share * own[key].double()) / (1 - share)
        rest_of_world[Key(key.module, REST_OF_WORLD, key.factor)] = rest.float()
    return rest_of_world
