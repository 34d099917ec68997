"""Certificates and keys as they are found: one clear line for each thing that can be wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)

from fedalt.errors import UserError, listed

CA = "ca.crt"
CERTIFICATE = "server.pem"
KEY = "server.key"
SITE_KEYS = "keys"
_FORM = (Encoding.OpenSSH, PublicFormat.OpenSSH)


def check_server(folder: Path, hosts: Sequence[str]) -> None:
    """Check a server's ``ca.crt``, ``server.pem`` and ``server.key``.

    Args:
        folder: Where they are.
        hosts: Names and addresses under which the server will be reached, all of which the certificate must be for.

    Raises:
        UserError: One is missing or broken, has expired, belongs to another host, or they do not belong together.
    """
    ca, certificate = check_ca(folder / CA), _certificate(folder / CERTIFICATE)
    key = folder / KEY
    try:
        private = load_pem_private_key(_read(key), password=None)
    except (ValueError, TypeError) as error:
        raise UserError(f"{key}: no private key in PEM format without a password ({error})") from None
    if private.public_key() != certificate.public_key():
        raise UserError(f"{key}: is not the key of {folder / CERTIFICATE}")
    _check_dates(folder / CERTIFICATE, certificate)
    try:
        certificate.verify_directly_issued_by(ca)
    except Exception:
        raise UserError(f"{folder / CERTIFICATE}: was not signed by {folder / CA}") from None
    for host in hosts:
        if host not in (names := names_of(certificate)):
            raise UserError(f"{folder / CERTIFICATE}: is for {listed(names)}, and not for {host}")


def server_names(folder: Path) -> list[str]:
    """The names and IP addresses that a server's certificate is for."""
    return names_of(_certificate(folder / CERTIFICATE))


def check_ca(path: Path) -> x509.Certificate:
    """The CA certificate that sites and users trust.

    Raises:
        UserError: It is missing, broken, or has expired.
    """
    certificate = _certificate(path)
    _check_dates(path, certificate)
    return certificate


def check_site_key(path: Path) -> None:
    """Check a site's private key.

    Raises:
        UserError: It is missing, broken, of a kind that Flower does not take, or the public half.
    """
    try:
        key = load_ssh_private_key(_read(path), password=None)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: no private key in OpenSSH's format without a password ({error})") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(f"{path}: an elliptic-curve key (ECDSA P-384, as fedalt certs makes them) is needed")


def site_keys(folder: Path) -> dict[str, str]:
    """The public keys of the sites that may take part: file name without ``.pub`` → the key, in OpenSSH's format.

    Raises:
        UserError: There is none, one is broken, or there twice.
    """
    keys: dict[str, str] = {}
    for path in sorted((folder / SITE_KEYS).glob("*.pub")):
        try:
            key = load_ssh_public_key(_read(path)).public_bytes(*_FORM).decode()
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: no public key in OpenSSH's format ({error})") from None
        twin = next((name for name, other in keys.items() if other == key), None)
        if twin is not None:
            raise UserError(f"{path}: the same key as {twin}.pub; every site needs one of its own")
        keys[path.stem] = key
    if not keys:
        raise UserError(f"{folder / SITE_KEYS}: no site keys (*.pub), so no site could join; fedalt certs makes them")
    return keys


def names_of(certificate: x509.Certificate) -> list[str]:
    """The names and IP addresses that a certificate is for."""
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = [str(address) for address in alternatives.get_values_for_type(x509.IPAddress)]
    return [*alternatives.get_values_for_type(x509.DNSName), *addresses]


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError as error:
        raise UserError(f"{path}: no certificate in PEM format ({error})") from None


def _check_dates(path: Path, certificate: x509.Certificate) -> None:
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise UserError(f"{path}: expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; make a new one")
    if now < certificate.not_valid_before_utc:
        raise UserError(f"{path}: is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC only")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
