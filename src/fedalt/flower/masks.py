"""Masks that vanish in a sum: the server learns Σ w·q of all who take part, and of no fewer.

    y_k = w_k q_k + Σ_{j>k} m_kj − Σ_{j<k} m_jk + b_k   (mod 2³² or 2⁶⁴),     Σ_k y_k − Σ_k b_k = Σ_k w_k q_k

m_kj is the key stream that sites k and j alone can compute (X25519, HKDF, ChaCha20), b_k the stream of a seed of k's
own. An attempt goes in three steps:

    offer   a site makes an X25519 key for this attempt and signs it, with run, round, client and weight
    mask    told all offers, it checks their signatures by the keys that *it* knows, and sends y_k
    open    when the masked vectors of all are there, it sends the seed of b_k

A site opens for one set of clients a round, and for no other. If somebody is gone before all have masked, nobody
opens, and the others begin a new attempt with new keys: the vectors of the first stay covered by b. If somebody is gone
between mask and open, the sum cannot be read, and the round has none. This is the double masking of Bonawitz et al.
(CCS 2017) without shares of seeds: a drop-out costs an attempt, or a round's sum, and no site is ever asked for what
would open another's vector.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray
from torch import Tensor

from fedalt.errors import UserError
from fedalt.federation.fixed import LIMIT, STEPS
from fedalt.files import read_json, write_json
from fedalt.flower.certs import PrivateKey, PublicKey, is_signed, sign
from fedalt.flower.requests import Offer, Request
from fedalt.runs.folder import RunFolder

_OFFER = b"fedalt offer 1\0"
_CHUNK = 2**22
OPENED = "opened.json"
Ring = NDArray[np.unsignedinteger]


def ring(weight: int) -> np.dtype[np.unsignedinteger]:
    """The narrowest ring in which a sum of these weights cannot overflow."""
    largest = LIMIT * STEPS * weight
    for kind in ("<u4", "<u8"):
        if 2 * largest < 2 ** (8 * np.dtype(kind).itemsize):
            return np.dtype(kind)
    raise UserError(f"weights of {weight:,} in all are too many for a secure sum")


@dataclass
class Session:
    """What a site holds of one attempt; it is gone with the process, and then the attempt is.

    Attributes:
        about: The attempt.
        offer: What it has offered.
        members: The offers for which it has masked, as a digest; empty before.
        clients: Whose they are.
    """

    about: str
    offer: Offer
    _secret: X25519PrivateKey
    _seed: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    members: str = ""
    clients: list[int] = field(default_factory=list)

    @staticmethod
    def begin(request: Request, client: int, weight: int, key: PrivateKey | None) -> Session:
        """A new key and seed, offered under the site's signature."""
        secret, about = X25519PrivateKey.generate(), attempt(request)
        offer = Offer(client, weight, secret.public_key().public_bytes_raw().hex(), "")
        signature = sign(key, _signed(about, offer)) if key else ""
        return Session(about, replace(offer, signature=signature), secret)

    def masked(self, vector: Tensor, offers: Sequence[Offer]) -> bytes:
        """What this site sends, whose w·q are given."""
        kind, members = ring(sum(offer.weight for offer in offers)), digest(offers)
        if self.members not in ("", members):
            raise UserError("asked to mask for other clients than before")
        self.members, self.clients = members, [offer.client for offer in offers]
        total = vector.numpy().astype(np.int64).astype(kind)
        _add(total, self._seed, members, 1)
        for other in offers:
            if other.client != self.offer.client:
                shared = self._secret.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(other.key)))
                _add(total, shared, members, 1 if self.offer.client < other.client else -1)
        return total.tobytes()

    @property
    def seed(self) -> str:
        """The seed of b."""
        return self._seed.hex()


@dataclass
class Sums:
    """A site's part in secure sums.

    Attributes:
        client: Whose.
        folder: Of the run, which keeps for whom the site has opened last.
        least: Fewest clients for which it masks.
        key: With which it signs; None where server and sites are one user's.
        peers: The keys of all sites that it knows.
    """

    client: int
    folder: RunFolder
    least: int
    key: PrivateKey | None
    peers: Mapping[int, PublicKey] | None
    _session: Session | None = None

    def offer(self, request: Request, weight: int) -> Offer:
        """Begin an attempt; a repeated question has the same answer."""
        if self._session is None or self._session.about != attempt(request):
            self._session = Session.begin(request, self.client, weight, self.key)
        return self._session.offer

    def mask(self, request: Request, vector: Tensor) -> bytes:
        """What this site sends, masked for all whose offers it is told."""
        session = self._of(request)
        check_offers(request, session.offer, self.peers, self.least)
        clients = [offer.client for offer in request.offers]
        if (before := self._opened(request.round)) not in (None, clients):
            raise UserError(f"round {request.round} was opened for clients {before}, and is for no others")
        return session.masked(vector * session.offer.weight, request.offers)

    def open(self, request: Request) -> str:
        """The seed of this site's own mask, once it is on disk for whom it was given."""
        session = self._of(request)
        if not session.members or self._opened(request.round) not in (None, session.clients):
            raise UserError(f"round {request.round} is not to be opened for clients {session.clients}")
        write_json(self._file, {"round": request.round, "clients": session.clients})
        return session.seed

    def _of(self, request: Request) -> Session:
        if self._session is None or self._session.about != attempt(request):
            raise UserError(f"attempt {request.attempt} of round {request.round} did not begin here, or is over")
        return self._session

    def _opened(self, round_: int) -> list[int] | None:
        """For whom a round was opened, if it was."""
        known = read_json(self._file) if self._file.is_file() else {}
        return known["clients"] if known.get("round") == round_ else None

    @property
    def _file(self) -> Path:
        return self.folder.path / OPENED


@dataclass
class Total:
    """What the server adds up of one attempt."""

    offers: Sequence[Offer]
    size: int
    _sum: Ring = field(init=False)

    def __post_init__(self) -> None:
        self._sum = np.zeros(self.size, ring(self.weight))

    @property
    def clients(self) -> list[int]:
        """Who takes part."""
        return [offer.client for offer in self.offers]

    @property
    def weight(self) -> int:
        """Σ w."""
        return sum(offer.weight for offer in self.offers)

    def add(self, block: bytes) -> None:
        """Add a masked vector."""
        if len(block) != self._sum.nbytes:
            raise UserError(f"{len(block)} bytes are no masked vector of {self.size} numbers")
        self._sum += np.frombuffer(block, self._sum.dtype)

    def opened(self, seeds: Mapping[int, str]) -> Tensor:
        """Σ w·q in int64."""
        members = digest(self.offers)
        for seed in seeds.values():
            _add(self._sum, bytes.fromhex(seed), members, -1)
        return torch.from_numpy(self._sum.view(f"<i{self._sum.itemsize}").astype(np.int64))


def check_offers(request: Request, own: Offer, keys: Mapping[int, PublicKey] | None, least: int) -> None:
    """Refuse to mask for fewer clients than there must be, or for clients whose keys this site does not know."""
    offers, about = request.offers, attempt(request)
    clients = [offer.client for offer in offers]
    if clients != sorted(set(clients)) or own not in offers:
        raise UserError("told offers without this site's own, or one client twice")
    if len(clients) < least:
        raise UserError(f"asked to mask for {len(clients)} clients, {least} are the fewest")
    if keys is None:
        return
    for offer in offers:
        if offer.client not in keys or not is_signed(keys[offer.client], _signed(about, offer), offer.signature):
            raise UserError(f"the offer of client {offer.client} is not signed with the key that this site has of it")


def attempt(request: Request) -> str:
    """Names an attempt."""
    return json.dumps([request.run, request.round, request.attempt])


def digest(offers: Sequence[Offer]) -> str:
    """Names who takes part in an attempt, with which keys and weights."""
    said = json.dumps([[offer.client, offer.weight, offer.key] for offer in offers])
    return hashlib.sha256(said.encode()).hexdigest()


def _signed(about: str, offer: Offer) -> bytes:
    return _OFFER + json.dumps([about, offer.client, offer.weight, offer.key]).encode()


def _add(total: Ring, secret: bytes, members: str, sign: int) -> None:
    """Add or take away the key stream of a secret; it is of no use for other members."""
    key = HKDF(hashes.SHA256(), 32, salt=bytes.fromhex(members), info=b"fedalt mask").derive(secret)
    stream = Cipher(ChaCha20(key, bytes(16)), None).encryptor()
    for start in range(0, len(total), _CHUNK):
        part = total[start : start + _CHUNK]
        mask = np.frombuffer(stream.update(bytes(part.nbytes)), part.dtype)
        part += mask if sign > 0 else (~mask + part.dtype.type(1))
