"""What the server tells clients, in files for another process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedalt.methods.exchange import Message
from fedalt.model.state import load_tensors, save_tensors
from fedalt.names import Tensors

Told = dict[str, tuple[str, float]]
"""Client, as JSON has it → file of the tensors that it is told, and its share in them."""


class Outbox:
    """Messages in files of a folder: one file for all who are told the same, made when they are asked for.

    Args:
        folder: Where they go.
        messages: What each client is told, if anything.
    """

    def __init__(self, folder: Path, messages: Mapping[int, Message]) -> None:
        self._folder, self._messages = folder, messages
        self._count = 0
        self._latest: Tensors | None = None

    def of(self, clients: Sequence[int]) -> Told:
        """Where the messages of some clients are."""
        return {str(client): self._put(self._messages[client]) for client in clients if client in self._messages}

    def _put(self, message: Message) -> tuple[str, float]:
        if message.tensors is not self._latest:
            self._latest, self._count = message.tensors, self._count + 1
            save_tensors(message.tensors, self._file)
        return str(self._file), message.share

    @property
    def _file(self) -> Path:
        return self._folder / f"{self._count}.safetensors"


def read(told: Told) -> dict[int, Message]:
    """The messages; those of one file share their tensors."""
    files = {file: load_tensors(Path(file)) for file, _ in told.values()}
    return {int(client): Message(files[file], share) for client, (file, share) in told.items()}
