"""FedALT with settings: the paper's ablations, and RoW LoRAs beyond the paper; each under a name of its own, too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from fedalt.config.section import Span
from fedalt.errors import UserError
from fedalt.methods.aggregators import FACTOR_MEAN, RestOfWorldSettings, cluster_rows
from fedalt.methods.algebra import refuse_weighting
from fedalt.methods.base import BOTH, NONE, Gathered, Message, Phase, Slot
from fedalt.methods.fedalt import FedALT, without_own
from fedalt.methods.registry import Variant
from fedalt.model.layer import Mixing
from fedalt.model.state import ClientState
from fedalt.names import INDIVIDUAL, MIXER, REST_OF_WORLD, Key, Tensors
from fedalt.registry import AGGREGATORS, METHODS


@METHODS.register("fedalt")
class FedALTVariants(FedALT):
    """Each client trains a LoRA of its own beside the frozen mean of the others', and weighs the two for every token.

    This is ``FedALT`` (``methods/fedalt.py``) with the paper's ablations and other RoW LoRAs as settings. A RoW LoRA
    that is made in another way than the paper's (``methods/aggregators.py``) needs single uploads at the server, which
    then answers each client separately.
    """

    section = "fedalt"

    class Settings(RestOfWorldSettings):
        """FedALT, its ablations, and RoW LoRAs beyond the paper."""

        clusters: int = Field(1, ge=1, description="RoW LoRAs per client, one per group of similar clients (paper: 1)")
        rest_of_world_from: Literal["others", "all"] = Field(
            "others", description="all: own LoRA included (ablation Global-avg)"
        )
        rest_of_world_update: Literal["frozen", "discard", "average"] = Field(
            "frozen",
            description="frozen (paper); or trained and thrown away, or trained and averaged (ablation RoW-Update)",
        )
        halved: bool = Field(
            False, description="both LoRAs have half of lora.r, at the same scale (ablation RoW-Update r4)"
        )
        mixing: Literal["mixer", "half", "one_over_k"] = Field(
            "mixer",
            description="per-token mixer (paper), or fixed weight of the individual LoRA: 1/2 or 1/K (ablations)",
        )
        full_start: Annotated[bool, Span(values=(False, True))] = Field(
            False,
            description="scale times the number of LoRAs, so that even weights leave the individual one at alpha/r",
        )
        mixer_average: bool = Field(False, description="average mixers over clients in every round (ablation)")

    settings: Settings

    def setup(self) -> None:
        """Slots, weights and flags that the settings ask for."""
        super().setup()
        self._check()
        if self.clients > 1:
            self.rows = tuple(REST_OF_WORLD + (str(c) if c else "") for c in range(self.settings.clusters))
        updated = self.settings.rest_of_world_update == "average"
        self.slots = (Slot(INDIVIDUAL), *(Slot(row, BOTH if updated else NONE) for row in self.rows))
        if self.clients > 1 and self.settings.mixing != "mixer":
            own = 0.5 if self.settings.mixing == "half" else 1 / self.clients
            self.mixing = Mixing("fixed", (own, 1 - own))
        self.needs_uploads = self.clients > 1 and not self._plain
        self.leave_one_out = self.settings.rest_of_world_from == "others"
        self.heterogeneous = self.settings.rest_of_world_aggregator in ("stack", "svd")

    def remarks(self) -> Sequence[str]:
        """Refuses robust rules that are none with so few clients."""
        name, others, settings = self.settings.rest_of_world_aggregator, self.clients - 1, self.settings
        if others and name == "trimmed_mean" and settings.trim * others < 1:
            instead = f"set fedalt.trim to {1 / others:.2g} or more" if others > 2 else "have more clients"
            raise UserError(
                f"fedalt.trim: {settings.trim:g} of {others} other clients drops nobody, so trimmed_mean would be the "
                f"plain mean; {instead}"
            )
        if others and name == "krum" and others < 2 * settings.byzantine + 3:
            raise UserError(
                f"fedalt.byzantine: {settings.byzantine} faulty clients need {2 * settings.byzantine + 3} uploads for "
                f"krum (n ≥ 2f + 3), and there are {others} others; {'lower it' if others > 2 else 'have more clients'}"
            )
        return super().remarks()

    @property
    def _plain(self) -> bool:
        return self.settings.rest_of_world_aggregator == FACTOR_MEAN and self.settings.clusters == 1

    def _check(self) -> None:
        settings, aggregator = self.settings, self.settings.rest_of_world_aggregator
        if getattr(AGGREGATORS.get(aggregator), "robust", False):
            refuse_weighting(self.config, f"fedalt.rest_of_world_aggregator={aggregator}", "which has no weights")
        own_in_it, averaged = settings.rest_of_world_from == "all", settings.rest_of_world_update == "average"
        if not self._plain and (own_in_it or averaged or settings.mixer_average):
            raise UserError(
                "fedalt: rest_of_world_from=all, rest_of_world_update=average and mixer_average need "
                "rest_of_world_aggregator=factor_mean and clusters=1"
            )
        if settings.clusters > 1 and settings.mixing != "mixer":
            raise UserError("fedalt.mixing: fixed weights are for one RoW LoRA; clusters need the mixer")
        if settings.clusters > 1 and aggregator != FACTOR_MEAN:
            raise UserError("fedalt.rest_of_world_aggregator: the RoW LoRAs of clusters are factor means")
        if own_in_it and averaged:
            raise UserError(
                "fedalt.rest_of_world_update: average is over the others, and rest_of_world_from=all has one RoW LoRA "
                "for everybody"
            )

    @property
    def newcomer(self) -> tuple[tuple[str, ...], Mixing]:
        """The RoW LoRAs alone, evenly weighed and past the mixer, which knows nothing yet."""
        if not self.rows:
            return self.inference
        full = len(self.slots) if self.settings.full_start else 1
        return self.rows, Mixing("fixed", (1 / (full * len(self.rows)),) * len(self.rows))

    @property
    def ranks(self) -> dict[str, int]:
        """The RoW LoRA's rank is r, or that of its aggregator: all others' ranks for a stack."""
        r, widest = self.config.lora.r, self.widest
        if self.settings.halved:
            if r % 2:
                raise UserError(f"fedalt.halved: lora.r = {r} is odd")
            r //= 2
            widest = max(self.client_ranks or (r,))
        row = r
        if self.settings.rest_of_world_aggregator == "svd":
            row = self.settings.rest_of_world_rank or r
        if self.settings.rest_of_world_aggregator == "stack":
            ranks = [self.rank_of(client) or r for client in range(self.clients)]
            row = sum(ranks) - min(ranks)
        return {INDIVIDUAL: widest, **dict.fromkeys(self.rows, row)}

    @property
    def scale(self) -> float:
        """The usual alpha/r; with ``full_start``, times the number of LoRAs, by which an even start divides."""
        return super().scale * (len(self.slots) if self.settings.full_start else 1)

    @property
    def frozen(self) -> tuple[str, ...]:
        """A RoW LoRA that trains starts like any LoRA, or it would stay at zero."""
        return self.rows if self.settings.rest_of_world_update == "frozen" else ()

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """The RoW LoRA trains, too, in the ablation RoW-Update."""
        (phase,) = super().phases(round_)
        rows = NONE if self.settings.rest_of_world_update == "frozen" else BOTH
        return (Phase(phase.slots, {**phase.train, **dict.fromkeys(self.rows, rows)}, phase.mixing),)

    def shares(self, key: Key) -> bool:
        """The individual LoRA; the mixer and the RoW LoRA only in ablations that average them."""
        return super().shares(key) or (key.slot == MIXER and self.settings.mixer_average)

    def left_out(self, key: Key) -> bool:
        """Everything but averaged mixers."""
        return key.slot != MIXER

    def receive(self, state: ClientState, message: Message) -> ClientState:
        """RoW LoRA ← what the server made of single uploads, or the mean, of the others unless the settings say all."""
        if self.clients == 1 or (message.share >= 1 and self.leave_one_out):
            return state
        if self.needs_uploads:
            return super(FedALT, self).receive(state, message)
        mixers = {key: value for key, value in message.tensors.items() if key.slot == MIXER}
        told = self._for_row(message.tensors)
        own = self._for_row(state.sent) if self.leave_one_out and message.share > 0 and state.sent else None
        return state.with_tensors({**without_own(told, own, message.share), **mixers})

    def _for_row(self, tensors: Tensors) -> Tensors:
        """What the next RoW LoRA is the mean of: individual LoRAs, or RoW LoRAs as they were trained."""
        source = REST_OF_WORLD if self.settings.rest_of_world_update == "average" else INDIVIDUAL
        return {key: value for key, value in tensors.items() if key.slot == source}

    def client_messages(self, gathered: Gathered) -> Callable[[int, int], Message]:
        """RoW LoRAs made from single uploads."""
        if self.settings.clusters > 1:
            rows = cluster_rows(gathered, self.rows)
        else:
            rows = AGGREGATORS.get(self.settings.rest_of_world_aggregator)(
                gathered, self.ranks[REST_OF_WORLD], self.settings
            )
        return lambda client, last: Message(rows(client))


def _variant(name: str, title: str, **settings: Any) -> None:
    dotted = {f"fedalt.{key}": value for key, value in settings.items()}
    METHODS.add(name, Variant("fedalt", title, dotted), __name__)


_variant("fedalt_row_update_half", "RoW-Update, half rank", halved=True, rest_of_world_update="discard")
_variant("fedalt_row_update", "RoW-Update", rest_of_world_update="discard")
_variant("fedalt_global_average", "Global-avg", rest_of_world_from="all")
_variant("fedalt_fixed_half", "fixed 1/2", mixing="half")
_variant("fedalt_fixed_one_over_k", "fixed 1/K", mixing="one_over_k")
_variant("fedalt_averaged_mixer", "averaged mixer", mixer_average=True)
_variant("fedalt_stack", "FedALT, exact rows", rest_of_world_aggregator="stack")
_variant("fedalt_svd", "FedALT, SVD rows", rest_of_world_aggregator="svd")
_variant("fedalt_fair", "FedALT, fitted rows", rest_of_world_aggregator="fair")
_variant("fedalt_median", "FedALT, median rows", rest_of_world_aggregator="median")
_variant("fedalt_trimmed_mean", "FedALT, trimmed rows", rest_of_world_aggregator="trimmed_mean")
_variant("fedalt_krum", "FedALT, Krum rows", rest_of_world_aggregator="krum")
_variant("fedalt_full_start", "FedALT, full start", full_start=True)
_variant("fedalt_clusters", "FedALT, 2 clusters", clusters=2)

ABLATIONS = (
    "fedalt",
    "fedalt_row_update_half",
    "fedalt_row_update",
    "fedalt_global_average",
    "fedalt_fixed_half",
    "fedalt_fixed_one_over_k",
    "fedalt_averaged_mixer",
)
"""The paper's Table 2 and Figure 3; its "r4" and "r8" of RoW-Update are half of ``lora.r`` = 8, and all of it."""
