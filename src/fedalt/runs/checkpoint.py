"""Checkpoints: one folder per finished round, whole or not there, safetensors and JSON only.

clients/<id>.safetensors    state of every client that has taken part so far
uploads/<id>.safetensors    every upload that counts in the server's mean
sum.safetensors             the mean of these uploads instead, where the server sees no single one
server.safetensors          what the server remembers besides, for methods that need it
manifest.json               which these are, of which run and round, with a digest of each and of itself

A round writes the files of its own clients and links those of the clients that rested.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedalt.errors import UserError
from fedalt.federation.server import Server, Upload
from fedalt.files import link, new_folder, read_json, sha256, write_json
from fedalt.model.state import ClientState, load_state, load_tensors, save_state, save_tensors
from fedalt.names import Tensors

STATES, UPLOADS, SERVER, MANIFEST = "clients", "uploads", "server.safetensors", "manifest.json"
SUM = "sum.safetensors"


@dataclass
class Checkpoint:
    """Everything a run needs to go on after a round. Tensors stay in their files until they are asked for.

    Attributes:
        round: The round; 0, without a folder, before the first.
        clients: Who has a state in it. The others have not taken part yet.
        uploads: The server's latest upload of every client that counts.
        best: Best round on validation rows so far and its score, if there are validation rows.
        seen: Client → the last round in which it delivered.
        memory: What the server remembers, besides uploads.
        summed: The mean of the uploads, where the server sees no single one.
        cohort: Clients on the model at a time; a resumed run keeps to it, since sums in another order round otherwise.
        digests: File → SHA-256, of files that are as they were in the round before.
    """

    path: Path
    round: int
    clients: set[int] = field(default_factory=set)
    uploads: Mapping[int, Upload] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    cohort: int = 1
    seen: Mapping[int, int] = field(default_factory=dict)
    memory: Tensors = field(default_factory=dict)
    summed: Tensors = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def best_round(self) -> list[int]:
        """The best round, if one is known."""
        return [self.best["round"]] if self.best else []

    def state(self, client: int) -> ClientState:
        """A client's state."""
        state = load_state(self._file(STATES, client))
        if state.client != client or state.round > self.round:
            raise ValueError(f"{STATES}/{client}.safetensors is of client {state.client}, round {state.round}")
        return state

    def upload(self, client: int) -> Tensors:
        """A client's upload, as the server received it."""
        return load_tensors(self._file(UPLOADS, client))

    def restore(self, server: Server) -> None:
        """Put the server back to where it was."""
        server.uploads, server.read, server.round = self.uploads, self.upload, self.round
        server.seen, server.memory, server.summed = self.seen, self.memory, self.summed
        server.forget()

    def put_state(self, state: ClientState) -> None:
        """Write a client's state."""
        save_state(state, self._file(STATES, state.client))
        self.clients.add(state.client)

    def put_upload(self, client: int, upload: Tensors) -> None:
        """Write what a client sent, if it sent anything."""
        if upload:
            save_tensors(upload, self._file(UPLOADS, client))

    def keep(self, previous: Checkpoint, states: Collection[int] = (), uploads: Collection[int] = ()) -> None:
        """Link what has not changed since the round before."""
        for part, clients in ((STATES, states), (UPLOADS, uploads)):
            for client in clients:
                link(previous._file(part, client), self._file(part, client))
                name = f"{part}/{client}.safetensors"
                self.digests |= {name: previous.digests[name]} if name in previous.digests else {}
        self.clients |= set(states)

    def write_manifest(self, run: str) -> None:
        """Write what is in the folder; the last file of a checkpoint."""
        uploads = {str(client): asdict(upload) for client, upload in self.uploads.items()}
        header = {"run": run, "round": self.round, "cohort": self.cohort, "clients": sorted(self.clients)}
        header |= {"seen": {str(client): round_ for client, round_ in self.seen.items()}}
        for name, tensors in ((SERVER, self.memory), (SUM, self.summed)):
            if tensors:
                save_tensors(tensors, self.path / name)
        files = (file for file in sorted(self.path.rglob("*.safetensors")))
        named = ((file.relative_to(self.path).as_posix(), file) for file in files)
        self.digests = {name: self.digests.get(name) or sha256(file) for name, file in named}
        manifest = {**header, "uploads": uploads, "best": self.best, "files": self.digests}
        write_json(self.path / MANIFEST, {**manifest, "digest": _digest(manifest)})

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Compare with a manifest; those of fedalt 0.1 know no digests."""
        if self.path.name != _name(self.round):
            raise ValueError(f"{MANIFEST} is of round {self.round}")
        if "files" in manifest or "digest" in manifest:
            said = dict(manifest)
            if said.pop("digest") != _digest(said):
                raise ValueError(f"{MANIFEST} has changed")
            changed = next((n for n, known in said["files"].items() if sha256(self.path / n) != known), None)
            if changed:
                raise ValueError(f"{changed} has changed")
            self.digests = said["files"]

    def _file(self, part: str, client: int) -> Path:
        return self.path / part / f"{client}.safetensors"


@contextmanager
def next_checkpoint(previous: Checkpoint, number: int | None = None) -> Iterator[Checkpoint]:
    """The next round's checkpoint, or a later one's, to be filled; there when the block ends well, else not at all."""
    number = previous.round + 1 if number is None else number
    path = previous.path.with_name(_name(number))
    with new_folder(path) as temporary:
        checkpoint = Checkpoint(temporary, number, best=previous.best, cohort=previous.cohort)
        yield checkpoint
    checkpoint.path = path


def run_id(settings: Mapping[str, Any], base: str, rows: str) -> str:
    """Identifies a run by what determines its numbers: settings, base weights, rows."""
    return _digest([settings, base, rows])[:16]


def prune(folder: Path, rounds: Iterable[int] = ()) -> None:
    """Keep the last two checkpoints and some others; drop the rest, and what a kill left half written."""
    keep = {path.name for path in _rounds(folder)[-2:]} | set(map(_name, rounds))
    for path in folder.glob("*round_*"):
        if path.name not in keep:
            shutil.rmtree(path)


def load_checkpoint(folder: Path, *runs: str, upto: int | None = None) -> Checkpoint | None:
    """The newest checkpoint, of one of these runs if any is named, no later than a round; None if there is none."""
    path = next((path for path in reversed(_rounds(folder)) if upto is None or _number(path) <= upto), None)
    if path is None:
        return None
    try:
        manifest = read_json(path / MANIFEST)
        uploads = {int(client): Upload(**known) for client, known in manifest["uploads"].items()}
        known = set(manifest["clients"])
        seen = {int(client): round_ for client, round_ in manifest["seen"].items()}
        memory, summed = (load_tensors(path / name) if (path / name).is_file() else {} for name in (SERVER, SUM))
        best, cohort = manifest["best"], manifest["cohort"]
        checkpoint = Checkpoint(path, manifest["round"], known, uploads, best, cohort, seen, memory, summed)
        checkpoint.check(manifest)
        for client in checkpoint.clients:
            checkpoint.state(client)
        for client in () if summed else uploads:
            checkpoint.upload(client)
    except Exception as error:
        raise UserError(
            f"{path}: damaged checkpoint ({error}); remove this folder to resume one round earlier"
        ) from None
    if runs and manifest["run"] not in runs:
        raise UserError(
            f"{path}: checkpoint of another run (other settings, base weights or rows); nothing was changed"
        )
    return checkpoint


def rounds_for(folder: Path, asked: Iterable[int]) -> set[int]:
    """The checkpoints that hold what was so after some rounds."""
    numbers = list(map(_number, _rounds(folder)))
    return {max((mine for mine in numbers if mine <= number), default=0) for number in asked}


def _number(path: Path) -> int:
    return int(path.name.removeprefix("round_"))


def _name(number: int) -> str:
    return f"round_{number:04d}"


def _rounds(folder: Path) -> list[Path]:
    found = (path for path in folder.glob("round_*") if re.fullmatch(r"round_\d{4,}", path.name))
    return sorted(found, key=_number)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
