"""HOST:PORT, and whether a server is there, speaks as expected and is the one that the CA vouches for."""

from __future__ import annotations

import errno
import http.client
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path

from fedalt.errors import UserError

WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Hosts that stand for every interface, and where the machine itself finds them."""


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def local(self) -> Address:
        """The address for processes of the same machine."""
        return Address(WILDCARDS.get(self.host, self.host), self.port)


def parse_address(text: str, flag: str) -> Address:
    """Read ``HOST:PORT``, or ``[::1]:PORT``."""
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    plain = bare and not any(c.isspace() or c in "/[]" for c in bare) and (bare != host or ":" not in host)
    if not colon or not plain or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f'{flag} "{text}": write HOST:PORT, for example 127.0.0.1:9092, without https://')
    return Address(bare, int(port))


def check_free(address: Address, flag: str) -> None:
    """Refuse an address that cannot be listened on."""
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


_SECONDS = 5.0
_EXPIRED, _NOT_YET = 10, 9
_OTHER_HOST = (62, 64)
"""OpenSSL's numbers of what is wrong with a certificate."""


@dataclass(frozen=True)
class Connection:
    """How to reach a server.

    Attributes:
        ca: CA certificate that must have signed the server's; plain text without encryption when not given.
    """

    address: Address
    ca: Path | None = None


class UnreachableError(UserError):
    """Nobody answers, which may change."""


def check_server(connection: Connection) -> None:
    """Ask a SuperLink whether it is well.

    Raises:
        UnreachableError: Nobody answers there.
    """
    address = connection.address
    try:
        status = _status(connection)
    except ssl.SSLCertVerificationError as error:
        raise UserError(f"{address}: {_certificate_problem(error, connection)}") from None
    except (ssl.SSLError, http.client.HTTPException, ConnectionResetError) as error:
        if connection.ca is None:
            raise UserError(f"{address}: does not answer in plain text; a server with TLS needs --ca FILE") from None
        raise UserError(
            f"{address}: does not speak TLS ({error}); leave --ca and --key out if it is meant so"
        ) from None
    except OSError as error:
        raise UnreachableError(f"{address}: no server answers ({error.strerror or error})") from None
    if status != http.client.OK:
        raise UserError(f"{address}: is no Flower SuperLink (it answers {status} when asked for /health)")


def _status(connection: Connection) -> int:
    host, port = connection.address.host, connection.address.port
    if connection.ca is None:
        line = http.client.HTTPConnection(host, port, timeout=_SECONDS)
    else:
        trusted = ssl.create_default_context(cafile=str(connection.ca))
        line = http.client.HTTPSConnection(host, port, timeout=_SECONDS, context=trusted)
    try:
        line.request("GET", "/health")
        return line.getresponse().status
    finally:
        line.close()


def shown_until(connection: Connection) -> datetime:
    """When the certificate ends that a server with TLS shows."""
    place = connection.address.host, connection.address.port
    trusted = ssl.create_default_context(cafile=str(connection.ca))
    try:
        line = trusted.wrap_socket(socket.create_connection(place, _SECONDS), server_hostname=place[0])
        with line:
            ends = str((line.getpeercert() or {})["notAfter"])
    except OSError as error:
        raise UnreachableError(f"{connection.address}: no server answers ({error.strerror or error})") from None
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(ends), UTC)


def _certificate_problem(error: ssl.SSLCertVerificationError, connection: Connection) -> str:
    if error.verify_code == _EXPIRED:
        return "the server's certificate has expired"
    if error.verify_code == _NOT_YET:
        return "the server's certificate is not valid yet; is this machine's clock right?"
    if error.verify_code in _OTHER_HOST:
        return f"the server's certificate is for another host, and not for {connection.address.host}"
    return f"the server's certificate was not signed by the CA in {connection.ca} ({error.verify_message})"
