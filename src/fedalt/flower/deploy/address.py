"""HOST:PORT."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from ipaddress import ip_address

from fedalt.errors import UserError

WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Hosts that stand for every interface, and where the machine itself finds them."""


@dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        host: A name or an IP address, without brackets.
        port: A TCP port.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def local(self) -> Address:
        """The address for processes of the same machine."""
        return Address(WILDCARDS.get(self.host, self.host), self.port)


def parse_address(text: str, flag: str) -> Address:
    """Read ``HOST:PORT``, or ``[::1]:PORT``.

    Raises:
        UserError: It is something else.
    """
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    plain = bare and not any(c.isspace() or c in "/[]" for c in bare) and (bare != host or ":" not in host)
    if not colon or not plain or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f'{flag} "{text}": write HOST:PORT, for example 127.0.0.1:9092, without https://')
    return Address(bare, int(port))


def check_free(address: Address, flag: str) -> None:
    """Refuse an address that cannot be listened on.

    Raises:
        UserError: Something listens there, it is not this machine's, or it is reserved.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except socket.gaierror as error:
        raise UserError(f"{flag} {address}: unknown host ({error.strerror})") from None
    except OSError as error:
        why = {
            errno.EADDRINUSE: "something listens there already; stop it or choose another port",
            errno.EADDRNOTAVAIL: "is no address of this machine; 0.0.0.0 stands for all of them",
        }
        raise UserError(f"{flag} {address}: {why.get(error.errno or 0, error.strerror)}") from None


def on_loopback(address: Address) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ip_address(address.host).is_loopback
    except ValueError:
        return address.host == "localhost"


def free_port() -> int:
    """A port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
