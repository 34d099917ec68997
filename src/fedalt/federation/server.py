"""The server: collects uploads, averages them in fp64, and tells every client its share of the mean."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from fedalt.config import FederationConfig
from fedalt.errors import UserError, shortened
from fedalt.federation.client import finite
from fedalt.methods.algebra import mean_of
from fedalt.methods.base import Gathered, Message, Method
from fedalt.names import HEAD, RANK_AXIS, Key, Tensors, parted
from fedalt.seeding import rng

T = TypeVar("T")


class PerClient(Mapping[int, T]):
    """A mapping whose values are made each time they are asked for and never kept."""

    def __init__(self, clients: Iterable[int], make: Callable[[int], T]) -> None:
        self._clients = dict.fromkeys(clients)
        self._make = make

    def __getitem__(self, client: int) -> T:
        if client not in self._clients:
            raise KeyError(client)
        return self._make(client)

    def __contains__(self, client: object) -> bool:
        return client in self._clients

    def __iter__(self) -> Iterator[int]:
        return iter(self._clients)

    def __len__(self) -> int:
        return len(self._clients)


def sample_clients(clients: tuple[int, ...], fraction: float, seed: int, round_: int) -> tuple[int, ...]:
    """max(⌊fraction·K⌋, 1) clients without replacement, ascending, from (seed, round) alone (Shepherd's rule)."""
    count = max(int(fraction * len(clients) + 1e-9), 1)
    order = torch.randperm(len(clients), generator=rng(seed, "participation", round_))
    return tuple(sorted(clients[i] for i in order[:count].tolist()))


DOMINANT = 0.5
"""Share of a mean beyond which a client gets its row from the server: subtraction multiplies rounding by 1/(1 − p)."""

OLDEST = 1e-200
"""Floor of ``staleness_decay ** age``: with a weight of exactly 0 nobody might be left to form a row."""


@dataclass(frozen=True)
class Upload:
    """What the server knows of one client's latest upload, besides its tensors.

    Attributes:
        weight: Unnormalised weight in the mean.
        round: Round in which it arrived.
    """

    weight: float
    round: int


def no_upload(client: int) -> Tensors:
    """Before the first round there is no upload to read."""
    raise KeyError(client)


@dataclass
class Server:
    """Aggregation for one run. For methods that need only a mean it reads one upload at a time and holds none.

    Attributes:
        method: Decides the weights, what is made of uploads, and whether absent clients' last ones still count.
        config: Participation and delivery settings.
        samples: Training rows per client.
        shapes: Shape of every tensor a client may upload, heads included if they are shared; rows and columns are the
            most where ranks are unequal.
        uploads: Latest upload per client that counts.
        read: Gives the tensors of such an upload, exactly as received.
        round: Last aggregated round, counted from 1.
        memory: What the method remembers from round to round.
        summed: The mean of the uploads, where no single one is known.
        seen: Client → the last round it delivered in.
        apart: Clients who may hold another upload than the one that counts, for it was late or lost, so that they
            cannot take themselves out of the mean and get a row of their own.
    """

    method: Method
    config: FederationConfig
    samples: Mapping[int, int]
    shapes: Mapping[Key, tuple[int, ...]]
    uploads: Mapping[int, Upload] = field(default_factory=dict)
    read: Callable[[int], Tensors] = no_upload
    round: int = 0
    memory: Tensors = field(default_factory=dict)
    summed: Tensors = field(default_factory=dict)
    seen: Mapping[int, int] = field(default_factory=dict)
    apart: set[int] = field(default_factory=set)

    def receive(
        self, arrived: Collection[int], read: Callable[[int], Tensors], round_: int, summed: Tensors | None = None
    ) -> None:
        """Take in the uploads of a round. A round in which nobody delivered changes nothing.

        FedAvg averages this round's participants. FedALT's rows come from everybody's last known upload, from this
        round's participants only, or from the last known ones with weight ``decay ** age``.

        Args:
            arrived: Clients that delivered.
            read: Gives the upload of each of them, and from now on of everybody else in ``uploads``, too.
            round_: The round.
            summed: The mean of their uploads, which is then all that there is to read.
        """
        for client in () if summed else arrived:
            self.check(client, read(client))
        kept = self.uploads if self.remembers or not arrived else {}
        self.uploads = {**kept, **{client: Upload(self._weight(client), round_) for client in sorted(arrived)}}
        self.read, self.round = read, round_
        self.summed = summed or ({} if arrived else self.summed)
        self.forget()
        if arrived:
            self.seen = {**self.seen, **dict.fromkeys(arrived, round_)}
            if self.method.has_server_state:
                self.memory = self.method.server_update(self._gathered())

    def forget(self) -> None:
        """Find out anew what is told, since uploads have changed."""
        for found in ("_answer", "_heads", "_mean"):
            self.__dict__.pop(found, None)

    @property
    def remembers(self) -> bool:
        """Whether uploads of absent clients stay in the mean; a secure sum is of a round's participants."""
        keeps = self.config.rest_of_world_participation != "participants" and not self.config.secure
        return self.method.keeps_absent and keeps

    def weights(self) -> dict[int, float]:
        """Current weight of every upload."""
        decay = self.config.staleness_decay if self.config.rest_of_world_participation == "staleness_decay" else 1.0
        return {
            client: upload.weight * (max(decay ** (self.round - upload.round), OLDEST) if self.remembers else 1.0)
            for client, upload in self.uploads.items()
        }

    def messages(self, clients: Sequence[int]) -> Mapping[int, Message]:
        """What each client is told: the broadcast mean with its own share in it, or an answer of its own.

        The broadcast mean is one object for all; any other answer is made when that client's message is asked for, so
        ask before the next round is received. A client that alone makes up the mean has no rest of the world and is
        told nothing.
        """
        weights = self.weights()
        told = [c for c in clients if weights and (weights.keys() != {c} or not self.method.leave_one_out)]
        if self.config.secure and self.method.leave_one_out:
            told = [c for c in told if c not in self.apart or c not in weights]  # they cannot take themselves out
        if not told:
            return {}
        if self.method.needs_uploads or self.method.has_server_state:
            return PerClient(told, self._answered)
        mean, total = self._mean, sum(weights.values())

        def message(client: int) -> Message:
            share = weights.get(client, 0.0) / total
            if not self._unicast(client, share):
                return Message(mean, share)
            rest = self.mean_without(client)
            return Message(
                {key: (rest if key.slot != HEAD and self.method.left_out(key) else mean)[key] for key in mean}
            )

        return PerClient(told, message)

    def _answered(self, client: int) -> Message:
        """The method's answer, with the mean of the heads, where they are shared."""
        message = self._answer(client, self.seen.get(client, 0))
        return replace(message, tensors={**message.tensors, **self._heads}) if self._heads else message

    @cached_property
    def _mean(self) -> Tensors:
        """The mean that this round's broadcast is; found once a round."""
        return self.mean()

    @cached_property
    def _heads(self) -> Tensors:
        """The mean of this round's heads."""
        if not any(key.slot == HEAD for key in self.shapes):
            return {}
        return mean_of(PerClient(self.uploads, lambda client: parted(self.read(client))[1]), self.weights())

    @cached_property
    def _answer(self) -> Callable[[int, int], Message]:
        """What the method makes of this round's uploads; found once a round."""
        return self.method.client_messages(self._gathered())

    @property
    def adapters(self) -> PerClient[Tensors]:
        """Every upload that counts, without heads."""
        return PerClient(self.uploads, lambda client: parted(self.read(client))[0])

    def _gathered(self) -> Gathered:
        return Gathered(self.adapters, self.weights(), self.memory, self.round)

    def _unicast(self, client: int, share: float) -> bool:
        alone = (
            self.config.rest_of_world_delivery == "unicast" or share > DOMINANT or (client in self.apart and share > 0)
        )
        return self.method.leave_one_out and alone and not self.config.secure

    def mean(self) -> dict[Key, Tensor]:
        """The mean of all uploads."""
        if self.summed:
            return dict(self.summed)
        return mean_of(PerClient(self.uploads, self.read), self.weights())

    def mean_without(self, client: int) -> dict[Key, Tensor]:
        """The mean of everybody else's uploads, summed directly: the reference for subtraction at the client."""
        others = {c: weight for c, weight in self.weights().items() if c != client}
        return mean_of(PerClient(self.uploads, self.read), others)

    def _weight(self, client: int) -> float:
        return float(self.samples[client]) if self.method.weighs_by(self.config) == "samples" else 1.0

    def check(self, client: int, tensors: Tensors) -> None:
        """Refuse an upload with other keys or shapes than the run's, or with a value that is not finite."""
        self.check_shapes(client, {key: tuple(value.shape) for key, value in tensors.items()})
        for key, value in tensors.items():
            if value.dtype != torch.float32:
                raise UserError(f"client {client}: {key} is {value.dtype}, this run has torch.float32")
            if not finite(value):
                raise UserError(f"client {client}: {key} is not finite")

    def check_shapes(self, client: int, shapes: Mapping[Key, tuple[int, ...]]) -> None:
        """Refuse other keys or shapes than the run's."""
        if shapes.keys() != self.shapes.keys():
            odd = shortened(min(map(str, shapes.keys() ^ self.shapes.keys())))
            count = len(shapes.keys() ^ self.shapes.keys())
            raise UserError(f"client {client}: upload has other tensors than this run ({odd}, {count} in all)")
        for key, shape in shapes.items():
            if not self._fits(key, shape):
                raise UserError(f"client {client}: {key} is {shape}, this run has {self.shapes[key]}")

    def _fits(self, key: Key, shape: tuple[int, ...]) -> bool:
        most = self.shapes[key]
        if self.method.client_ranks is None or key.slot == HEAD:
            return shape == most
        inner = RANK_AXIS[key.factor]
        return len(shape) == 2 and shape[1 - inner] == most[1 - inner] and 1 <= shape[inner] <= most[inner]
