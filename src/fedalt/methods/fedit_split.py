"""FedIT-split: several small LoRAs in place of one, each averaged with its like."""

from __future__ import annotations

from fedalt.config import LoraConfig, RunConfig
from fedalt.errors import UserError
from fedalt.methods.base import BOTH, Method, Phase, Slot
from fedalt.model.mixing import SOFTMAX, SUM, Mixing
from fedalt.names import MIXER, G, Key


class FedITSplit(Method):
    """FedIT with n parallel LoRAs of rank r/n: y = W0 x + s Σ_i ω_i(x) B_i A_i x̃, averaged slot by slot.

    Without a router (ω ≡ 1) and with the same scale this is FedIT exactly, since the blocks [B_1 … B_n][A_1; …; A_n]
    add up to Σ B_i A_i and averaging and AdamW act element by element; so the default has a softmax router, averaged
    like the LoRAs. The FedALT paper compares with a method of this name without defining it: the number of parts,
    router and its averaging are this implementation's reading.
    """

    name = "fedit_split"
    title = "FedIT-split"
    source = "baseline of arXiv 2503.11880"

    def __init__(self, clients: int, config: RunConfig | None = None) -> None:
        super().__init__(clients, config)
        self.options = self.config.fedit_split
        self.slots = tuple(Slot(f"part{i}") for i in range(self.options.parts))
        fixed = Mixing("fixed", (1 / self.options.parts,) * self.options.parts)
        self.mixing = {"none": SUM, "mean": fixed, "softmax": SOFTMAX}[self.options.router]

    def ranks(self, r: int) -> dict[str, int]:
        """r/n each.

        Raises:
            UserError: n does not divide r.
        """
        if r % self.options.parts:
            raise UserError(f"lora.r: {r} is not divisible by fedit_split.parts = {self.options.parts}")
        return {slot.name: r // self.options.parts for slot in self.slots}

    def scale(self, lora: LoraConfig) -> float:
        """alpha/r, or alpha over each part's rank."""
        return lora.alpha / (lora.r if self.options.scaling == "rank" else self.ranks(lora.r)[self.slots[0].name])

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """All parts, and the router."""
        train = {**{slot.name: BOTH for slot in self.slots}, MIXER: frozenset(G)}
        return (Phase(self.slot_names, train, self.mixing),)

    def shares(self, key: Key) -> bool:
        """All parts; the router if it is averaged."""
        return super().shares(key) or (key.slot == MIXER and self.options.router_average)
