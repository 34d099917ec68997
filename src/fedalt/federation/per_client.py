"""Something of every client, without holding it for all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


class PerClient(Mapping[int, T]):
    """A mapping whose values are made each time they are asked for and never kept.

    Args:
        clients: Ids that have a value, in the order of iteration.
        make: Reads or computes one client's value.
    """

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
