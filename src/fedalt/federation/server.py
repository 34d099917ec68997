"""The server: collects uploads, averages them in fp64, and tells every client its share of the mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedalt.config import FederationConfig
from fedalt.errors import UserError
from fedalt.methods.base import Message, Method
from fedalt.names import Key, Tensors

DOMINANT = 0.5
"""Share of a mean beyond which a client gets its row from the server: subtraction multiplies rounding by 1/(1 − p)."""

OLDEST = 1e-200
"""Floor of ``staleness_decay ** age``: with a weight of exactly 0 nobody might be left to form a row."""


@dataclass(frozen=True)
class Upload:
    """One client's latest upload.

    Attributes:
        tensors: Its shared factors, exactly as received.
        weight: Unnormalised weight in the mean.
        round: Round in which it arrived.
    """

    tensors: Tensors
    weight: float
    round: int


@dataclass
class WeightedSum:
    """A running Σ w·X in fp64: additive, mergeable, and as large as one upload whatever the number of clients."""

    total: dict[Key, Tensor] = field(default_factory=dict)
    weight: float = 0.0

    def add(self, tensors: Tensors, weight: float) -> None:
        """Add one upload."""
        for key, value in tensors.items():
            term = value.double() * weight
            self.total[key] = self.total[key] + term if key in self.total else term
        self.weight += weight

    def mean(self) -> dict[Key, Tensor]:
        """Σ w·X / Σ w in fp32.

        Raises:
            ZeroDivisionError: Nothing was added, or only weights of zero.
        """
        if self.weight <= 0:
            raise ZeroDivisionError("the mean of uploads with total weight 0 is undefined")
        return {key: (value / self.weight).float() for key, value in self.total.items()}


@dataclass
class Server:
    """Aggregation for one run.

    Attributes:
        method: Decides the weights and whether absent clients' last uploads stay in the mean.
        config: Participation and delivery settings.
        samples: Training rows per client.
        shapes: Shape of every tensor a client may upload.
        uploads: Latest upload per client that counts.
        round: Last aggregated round, counted from 1.
    """

    method: Method
    config: FederationConfig
    samples: Mapping[int, int]
    shapes: Mapping[Key, tuple[int, int]]
    uploads: dict[int, Upload] = field(default_factory=dict)
    round: int = 0

    def receive(self, arrived: Mapping[int, Tensors], round_: int) -> None:
        """Take in the uploads of a round. A round in which nobody delivered changes nothing.

        FedAvg averages this round's participants. FedALT's rows come from everybody's last known upload, from this
        round's participants only, or from the last known ones with weight ``decay ** age``.

        Raises:
            UserError: An upload with other keys or shapes than the run's, or with a value that is not finite.
        """
        self.round = round_
        if not arrived:
            return
        for client, tensors in arrived.items():
            self._check(client, tensors)
        if not self.remembers:
            self.uploads = {}
        for client, tensors in sorted(arrived.items()):
            self.uploads[client] = Upload(tensors, self._weight(client), round_)

    @property
    def remembers(self) -> bool:
        """Whether uploads of absent clients stay in the mean."""
        return self.method.leave_one_out and self.config.row_participation != "participants"

    def weights(self) -> dict[int, float]:
        """Current weight of every upload."""
        decay = self.config.staleness_decay if self.config.row_participation == "staleness_decay" else 1.0
        return {
            client: upload.weight * (max(decay ** (self.round - upload.round), OLDEST) if self.remembers else 1.0)
            for client, upload in self.uploads.items()
        }

    def messages(self, clients: tuple[int, ...]) -> dict[int, Message]:
        """What each client is told: the broadcast mean with its own share in it, or a mean made without it.

        A client that alone makes up the mean has no rest of the world and is told nothing.
        """
        weights = self.weights()
        if not weights:
            return {}
        mean, total = self.mean(), sum(weights.values())
        shares = {
            c: weights.get(c, 0.0) / total for c in clients if weights.keys() != {c} or not self.method.leave_one_out
        }
        return {
            c: Message(self.mean_without(c), 0.0) if self._unicast(share) else Message(mean, share)
            for c, share in shares.items()
        }

    def _unicast(self, share: float) -> bool:
        return self.method.leave_one_out and (self.config.row_delivery == "unicast" or share > DOMINANT)

    def mean(self) -> dict[Key, Tensor]:
        """The mean of all uploads."""
        return self._mean(self.uploads)

    def mean_without(self, client: int) -> dict[Key, Tensor]:
        """The mean of everybody else's uploads, summed directly: the reference for subtraction at the client."""
        return self._mean({c: upload for c, upload in self.uploads.items() if c != client})

    def _mean(self, uploads: Mapping[int, Upload]) -> dict[Key, Tensor]:
        weights, running = self.weights(), WeightedSum()
        for client, upload in uploads.items():
            running.add(upload.tensors, weights[client])
        return running.mean()

    def _weight(self, client: int) -> float:
        rule = self.method.weighting if self.config.weighting == "method" else self.config.weighting
        return float(self.samples[client]) if rule == "samples" else 1.0

    def _check(self, client: int, tensors: Tensors) -> None:
        if tensors.keys() != self.shapes.keys():
            odd = sorted(str(key) for key in tensors.keys() ^ self.shapes.keys())
            raise UserError(f"client {client}: upload has other tensors than this run ({odd[0]}, {len(odd)} in all)")
        for key, value in tensors.items():
            if tuple(value.shape) != self.shapes[key]:
                raise UserError(f"client {client}: {key} is {tuple(value.shape)}, this run has {self.shapes[key]}")
            if value.dtype != torch.float32:
                raise UserError(f"client {client}: {key} is {value.dtype}, this run has torch.float32")
            if not torch.isfinite(value).all():
                raise UserError(f"client {client}: {key} is not finite")
