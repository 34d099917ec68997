"""Is a server there, does it speak as expected, and is it the one that the CA vouches for?"""

from __future__ import annotations

import http.client
import ssl
from dataclasses import dataclass
from pathlib import Path

from fedalt.errors import UserError
from fedalt.flower.deploy.address import Address

_SECONDS = 5.0
_EXPIRED, _NOT_YET = 10, 9
_OTHER_HOST = (62, 64)
"""OpenSSL's numbers of what is wrong with a certificate."""


@dataclass(frozen=True)
class Connection:
    """How to reach a server.

    Attributes:
        address: Where it is.
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
        UserError: The server is not a SuperLink, not the one that the CA vouches for, or one of the two sides encrypts.
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


def _certificate_problem(error: ssl.SSLCertVerificationError, connection: Connection) -> str:
    if error.verify_code == _EXPIRED:
        return "the server's certificate has expired"
    if error.verify_code == _NOT_YET:
        return "the server's certificate is not valid yet; is this machine's clock right?"
    if error.verify_code in _OTHER_HOST:
        return f"the server's certificate is for another host, and not for {connection.address.host}"
    return f"the server's certificate was not signed by the CA in {connection.ca} ({error.verify_message})"
