"""FedIT-split: several small LoRAs in place of one, each averaged with its like."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedalt.config.section import Section
from fedalt.errors import UserError
from fedalt.methods.base import BOTH, Method, Phase, Slot
from fedalt.model.layer import SOFTMAX, SUM, Mixing
from fedalt.names import MIXER, G, Key
from fedalt.registry import METHODS


@METHODS.register("fedit_split")
class FedITSplit(Method):
    """FedIT with n parallel LoRAs of rank r/n: y = W0 x + s Σ_i ω_i(x) B_i A_i x̃, averaged slot by slot.

    Without a router (ω ≡ 1) and with the same scale this is FedIT exactly, since the blocks [B_1 … B_n][A_1; …; A_n]
    add up to Σ B_i A_i and averaging and AdamW act element by element; so the default has a softmax router, averaged
    like the LoRAs. The FedALT paper compares with a method of this name without defining it: the number of parts,
    router and its averaging are this implementation's reading.
    """

    class Settings(Section):
        """FedIT with several small LoRAs in place of one."""

        parts: int = Field(2, ge=2, description="LoRAs, each of rank lora.r / parts")
        router: Literal["none", "mean", "softmax"] = Field("softmax", description="weights: 1, 1/parts, or per token")
        router_average: bool = Field(True, description="average the router like the LoRAs, or keep it at the client")
        scaling: Literal["rank", "part"] = Field(
            "rank", description="scale alpha over lora.r, or over each part's rank"
        )

    settings: Settings

    title = "FedIT-split"
    source = "baseline of arXiv 2503.11880"

    def setup(self) -> None:
        """The parts, and how they are weighed."""
        self.slots = tuple(Slot(f"part{i}") for i in range(self.settings.parts))
        fixed = Mixing("fixed", (1 / self.settings.parts,) * self.settings.parts)
        self.mixing = {"none": SUM, "mean": fixed, "softmax": SOFTMAX}[self.settings.router]

    @property
    def ranks(self) -> dict[str, int]:
        """r/n each."""
        r = self.config.lora.r
        if r % self.settings.parts:
            raise UserError(f"lora.r: {r} is not divisible by fedit_split.parts = {self.settings.parts}")
        return {slot.name: r // self.settings.parts for slot in self.slots}

    @property
    def scale(self) -> float:
        """alpha/r, or alpha over each part's rank."""
        lora = self.config.lora
        return lora.scale(lora.r if self.settings.scaling == "rank" else self.ranks[self.slots[0].name])

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """All parts, and the router."""
        train = {**{slot.name: BOTH for slot in self.slots}, MIXER: frozenset(G)}
        return (Phase(self.slot_names, train, self.mixing),)

    def shares(self, key: Key) -> bool:
        """All parts; the router if it is averaged."""
        return super().shares(key) or (key.slot == MIXER and self.settings.router_average)
