"""FedALT: an individual LoRA, a frozen rest-of-world LoRA, and a per-token mixer; its ablations and other rows."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fedalt.config import LoraConfig, RunConfig
from fedalt.errors import UserError
from fedalt.methods.base import BOTH, NONE, Method, Phase, Slot
from fedalt.methods.clusters import cluster_rows
from fedalt.methods.exchange import Gathered, Message
from fedalt.methods.mean import refuse_weighting
from fedalt.methods.rows import AGGREGATORS, ROBUST
from fedalt.model.mixing import SOFTMAX, SUM, Mixing
from fedalt.model.state import ClientState
from fedalt.names import INDIVIDUAL, MIXER, ROW, Key, Tensors


class FedALT(Method):
    """Federated fine-tuning with adaptive local training, AAAI 2026, arXiv 2503.11880, §3.

        y = W0 x + s · [α_L(x) B_L A_L x̃ + α_R(x) B_R A_R x̃],   (α_L, α_R) = softmax(G x)

    The client trains its individual LoRA (A_L, B_L) and its mixer G, uploads the individual LoRA alone, and never has
    it overwritten. The row LoRA (A_R, B_R) is frozen: the uniform mean of the *others'* individual LoRAs, factor by
    factor. The server may send everybody the same mean; the client takes itself out of it:

        A_R^k = (Ā − p_k A_L^k) / (1 − p_k),   with A_L^k exactly as the server received it

    Differences from the official code: only the individual LoRA is uploaded (the code sends everything and ignores
    the rest), the mean is broadcast, and a federation of one client has no row and no mixer, so it equals Local (the
    code crashes). Mixer row 0 is the individual LoRA here and the row LoRA in the official code.

    The section ``fedalt`` of the settings has the paper's ablations (a row that trains, a row that holds the client
    itself, fixed weights, averaged mixers) and rows made in other ways (``methods/rows.py``, ``methods/clusters.py``),
    for which the server needs single uploads and answers each client separately.
    """

    name = "fedalt"
    title = "FedALT"
    source = "AAAI 2026, arXiv 2503.11880"
    weighting = "uniform"
    remembers = True

    def __init__(self, clients: int, config: RunConfig | None = None) -> None:
        super().__init__(clients, config)
        self.options = self.config.fedalt
        self._check()
        alone = clients == 1
        self.rows = () if alone else tuple(ROW + (str(c) if c else "") for c in range(self.options.clusters))
        updated = self.options.row_update == "average_rows"
        self.slots = (Slot(INDIVIDUAL), *(Slot(row, BOTH if updated else NONE) for row in self.rows))
        self.mixing = SUM if alone else self._mixing()
        self.individually = not alone and (self.options.row_aggregator != "factor_mean" or self.options.clusters > 1)
        self.leave_one_out = self.options.row_from == "others"
        self.heterogeneous = self.options.row_aggregator in ("stack", "svd")

    @property
    def arrival(self) -> tuple[tuple[str, ...], Mixing]:
        """The rows alone, evenly weighed and past the mixer, which knows nothing yet."""
        if not self.rows:
            return self.inference
        full = len(self.slots) if self.options.full_start else 1
        return self.rows, Mixing("fixed", (1 / (full * len(self.rows)),) * len(self.rows))

    def _check(self) -> None:
        options = self.options
        if options.row_aggregator in ROBUST:
            refuse_weighting(self.config, f"fedalt.row_aggregator={options.row_aggregator}", "which has no weights")
        plain = options.row_aggregator == "factor_mean" and options.clusters == 1
        if not plain and (options.row_from == "all" or options.row_update == "average_rows" or options.mixer_average):
            raise UserError(
                "fedalt: row_from, row_update=average_rows and mixer_average need factor_mean rows, clusters=1"
            )
        if options.clusters > 1 and options.mixing != "mixer":
            raise UserError("fedalt.mixing: fixed weights are for one row; clusters need the mixer")
        if options.clusters > 1 and options.row_aggregator != "factor_mean":
            raise UserError("fedalt.row_aggregator: clustered rows are factor means")
        if options.row_from == "all" and options.row_update == "average_rows":
            raise UserError(
                "fedalt.row_update: averaged rows are those of the others; row_from=all has one row for all"
            )

    def _mixing(self) -> Mixing:
        if self.options.mixing == "mixer":
            return SOFTMAX
        own = 0.5 if self.options.mixing == "half" else 1 / self.clients
        return Mixing("fixed", (own, 1 - own))

    def ranks(self, r: int) -> dict[str, int]:
        """The row's rank is r, or that of its aggregator: all others' ranks for a stack.

        Raises:
            UserError: An odd rank is to be halved.
        """
        if self.options.halved:
            if r % 2:
                raise UserError(f"fedalt.halved: lora.r = {r} is odd")
            r //= 2
        row = r
        if self.options.row_aggregator == "svd":
            row = self.options.row_rank or r
        if self.options.row_aggregator == "stack":
            ranks = [self.rank_of(client) or r for client in range(self.clients)]
            row = sum(ranks) - min(ranks)
        return {INDIVIDUAL: self.widest(r), **dict.fromkeys(self.rows, row)}

    def scale(self, lora: LoraConfig) -> float:
        """The usual alpha/r; with ``full_start``, times the number of LoRAs, by which an even start divides."""
        return super().scale(lora) * (len(self.slots) if self.options.full_start else 1)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The rows: nobody has uploaded yet. A row that trains starts like any LoRA, or it would stay at zero."""
        return self.rows if self.options.row_update == "frozen" else ()

    def phases(self, round_: int) -> tuple[Phase, ...]:
        """The individual LoRA and the mixer train; the rows only in the ablation RoW-Update."""
        rows = NONE if self.options.row_update == "frozen" else BOTH
        train = {INDIVIDUAL: BOTH, MIXER: frozenset("G"), **dict.fromkeys(self.rows, rows)}
        return (Phase(self.slot_names, train, self.mixing),)

    def shares(self, key: Key) -> bool:
        """The individual LoRA; the mixer and the row only in ablations that average them."""
        return super().shares(key) or (key.slot == MIXER and self.options.mixer_average)

    def left_out(self, key: Key) -> bool:
        """Everything but averaged mixers."""
        return key.slot != MIXER

    def install(self, state: ClientState, message: Message) -> ClientState:
        """Row ← mean of the others. When nobody else is in the mean, the row stays as it is."""
        if self.clients == 1 or (message.share >= 1 and self.leave_one_out):
            return state
        if self.individually:
            return super().install(state, message)
        mixers = {key: value for key, value in message.tensors.items() if key.slot == MIXER}
        told = self._for_row(message.tensors)
        own = self._for_row(state.sent) if self.leave_one_out and message.share > 0 and state.sent else None
        return state.with_tensors({**leave_one_out(told, own, message.share), **mixers})

    def _for_row(self, tensors: Tensors) -> Tensors:
        """What the next row is the mean of: individual LoRAs, or rows as they were trained."""
        source = ROW if self.options.row_update == "average_rows" else INDIVIDUAL
        return {key: value for key, value in tensors.items() if key.slot == source}

    def answers(self, gathered: Gathered) -> Callable[[int, int], Message]:
        """Rows made from single uploads."""
        if self.options.clusters > 1:
            rows = cluster_rows(gathered, self.rows)
        else:
            rank = self.ranks(self.config.lora.r)[ROW]
            rows = AGGREGATORS[self.options.row_aggregator](gathered, rank, self.options)
        return lambda client, last: Message(rows(client))


def leave_one_out(mean: Tensors, own: Tensors | None, share: float) -> dict[Key, Tensor]:
    """(X̄ − p·X_k)/(1 − p) in fp64, as the row slot's tensors; with ``own`` absent the mean is the row already."""
    row = {}
    for key, value in mean.items():
        rest = value.double() if own is None else (value.double() - share * own[key].double()) / (1 - share)
        row[Key(key.module, ROW, key.factor)] = rest.float()
    return row
