"""Certificates and keys: made, changed and checked, with one clear line for each thing that can be wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import TypeAlias, cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedalt.errors import UserError, listed
from fedalt.files import new_folder, read_bytes, write_bytes

CA = "ca.crt"
CA_KEY = "ca.key"
CERTIFICATE = "server.pem"
KEY = "server.key"
SITE_KEYS = "keys"
TLS = "FEDALT_TLS"
"""In the environment of a server's processes: the folder with the public keys of its sites, if they have keys."""
_FORM = (Encoding.OpenSSH, PublicFormat.OpenSSH)
_OF_CLIENT = re.compile(r"client_(0|[1-9]\d{0,6})")
PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey
PublicKey: TypeAlias = ec.EllipticCurvePublicKey


def check_server(folder: Path, hosts: Sequence[str]) -> None:
    """Check a server's ``ca.crt``, ``server.pem`` and ``server.key``; the certificate must be for all of ``hosts``."""
    ca, certificate = check_ca(folder / CA), _certificate(folder / CERTIFICATE)
    _key_of(folder / CERTIFICATE, folder / KEY)
    _check_dates(folder / CERTIFICATE, certificate)
    try:
        certificate.verify_directly_issued_by(ca)
    except Exception:
        raise UserError(f"{folder / CERTIFICATE}: was not signed by {folder / CA}") from None
    for host in hosts:
        if host not in (names := names_of(certificate)):
            raise UserError(f"{folder / CERTIFICATE}: is for {listed(names)}, and not for {host}")


def _key_of(certificate: Path, key: Path) -> CertificateIssuerPrivateKeyTypes:
    try:
        private = load_pem_private_key(read_bytes(key), password=None)
    except (ValueError, TypeError) as error:
        raise UserError(f"{key}: no private key in PEM format without a password ({error})") from None
    if private.public_key() != _certificate(certificate).public_key():
        raise UserError(f"{key}: is not the key of {certificate}")
    return cast(CertificateIssuerPrivateKeyTypes, private)


def valid_until(folder: Path) -> dict[str, datetime]:
    """File → when it ends, of a folder's certificates."""
    return {name: _certificate(folder / name).not_valid_after_utc for name in (CA, CERTIFICATE)}


def ending(what: str, until: datetime) -> list[str]:
    """A warning, if a certificate ends soon."""
    left = (until - datetime.now(UTC)).days
    how = "fedalt certs DIR --renew, and start the server again" if what != CA else "make a new folder of certificates"
    return [f"{what} ends on {until:%Y-%m-%d}, in {left} days: {how}"] if left < SOON else []


def server_names(folder: Path) -> list[str]:
    """The names and IP addresses that a server's certificate is for."""
    return names_of(_certificate(folder / CERTIFICATE))


def check_ca(path: Path) -> x509.Certificate:
    """The CA certificate that sites and users trust."""
    certificate = _certificate(path)
    _check_dates(path, certificate)
    return certificate


def check_site_key(path: Path) -> PrivateKey:
    """Check a site's private key, and return it."""
    try:
        key = load_ssh_private_key(read_bytes(path), password=None)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: no private key in OpenSSH's format without a password ({error})") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(f"{path}: an elliptic-curve key (ECDSA P-384, as fedalt certs makes them) is needed")
    return key


def sign(key: PrivateKey, data: bytes) -> str:
    """A signature, in hexadecimal digits."""
    return key.sign(data, ec.ECDSA(hashes.SHA384())).hex()


def is_signed(key: PublicKey, data: bytes, signature: str) -> bool:
    """Whether a signature is this key's, over these bytes."""
    try:
        key.verify(bytes.fromhex(signature), data, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError):
        return False
    return True


def client_keys(folder: Path) -> dict[int, PublicKey]:
    """Client → the public key of its site, by the names of the files in ``keys``."""
    return keys_in(folder / SITE_KEYS)


def keys_in(folder: Path) -> dict[int, PublicKey]:
    """Client → public key, of all ``client_N.pub`` in a folder."""
    found = {site: load_ssh_public_key(text.encode()) for site, text in _texts(folder).items()}
    return {int(site.removeprefix("client_")): key for site, key in found.items() if isinstance(key, PublicKey)}


def site_keys(folder: Path) -> dict[str, str]:
    """The public keys of the sites that may take part: file name without ``.pub`` → the key, in OpenSSH's format."""
    return _texts(folder / SITE_KEYS)


def _texts(folder: Path) -> dict[str, str]:
    keys: dict[str, str] = {}
    for path in sorted(folder.glob("*.pub")):
        if not _OF_CLIENT.fullmatch(path.stem):
            raise UserError(f"{path}: call it client_N.pub; a key says which client a site is")
        try:
            public = load_ssh_public_key(read_bytes(path))
            key = public.public_bytes(*_FORM).decode()
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}: no public key in OpenSSH's format ({error})") from None
        if not isinstance(public, PublicKey):
            raise UserError(f"{path}: an elliptic-curve key (ECDSA P-384, as fedalt certs makes them) is needed")
        twin = next((name for name, other in keys.items() if other == key), None)
        if twin is not None:
            raise UserError(f"{path}: the same key as {twin}.pub; every site needs one of its own")
        keys[path.stem] = key
    if not keys:
        raise UserError(f"{folder}: no site keys (*.pub), so no site could join; fedalt certs makes them")
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
        return x509.load_pem_x509_certificate(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path}: no certificate in PEM format ({error})") from None


def _check_dates(path: Path, certificate: x509.Certificate) -> None:
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise UserError(f"{path}: expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; make a new one")
    if now < certificate.not_valid_before_utc:
        raise UserError(f"{path}: is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC only")


SOON = 30
"""Days of a certificate from which on it is warned of."""
_CA_TIMES = 10
"""How many times as long as a server's certificate a CA's is valid: sites need not be given another."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_SKEW = timedelta(hours=1)
"""Certificates count from an hour ago, for sites whose clocks are late."""


def make_certs(folder: Path, sites: int, hosts: Sequence[str] = (), days: int = 365) -> list[str]:
    """Make ``ca.crt``, ``server.pem`` and ``keys/client_<i>`` with their private halves (mode 0600) in a new folder.

    ``hosts`` are names and IP addresses of the server, besides those of loopback. Site keys are ECDSA P-384 in
    OpenSSH's format, as ``flower-supernode`` reads them. Returns the names that the server certificate is for.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists already; keys are never overwritten, choose another folder")
    names = list(dict.fromkeys([*LOOPBACK, *hosts]))
    alternatives = x509.SubjectAlternativeName([_alternative(name) for name in names])
    until = datetime.now(UTC) + timedelta(days=days)
    ca_key, server_key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    ca = _ca(ca_key, datetime.now(UTC) + _CA_TIMES * timedelta(days=days))
    server = _server(server_key.public_key(), alternatives, until, ca, ca_key)
    with new_folder(folder) as inside:
        write_bytes(inside / CA, ca.public_bytes(Encoding.PEM))
        _write_private(inside / CA_KEY, ca_key, PrivateFormat.PKCS8)
        write_bytes(inside / CERTIFICATE, server.public_bytes(Encoding.PEM))
        _write_private(inside / KEY, server_key, PrivateFormat.PKCS8)
        for site in range(sites):
            _make_key(inside, site)
    return names


def _make_key(folder: Path, client: int) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    _write_private(folder / SITE_KEYS / f"client_{client}", key, PrivateFormat.OpenSSH)
    write_bytes(folder / SITE_KEYS / f"client_{client}.pub", key.public_key().public_bytes(*_FORM) + b"\n")


def renew(folder: Path, hosts: Sequence[str] = (), days: int = 365) -> datetime:
    """Sign the server's certificate anew, for the same key and names and for ``hosts``; returns when it ends.

    Needs ``ca.key``, and no key of the server's.
    """
    ca, old = check_ca(folder / CA), _certificate(folder / CERTIFICATE)
    ca_key, public = _key_of(folder / CA, folder / CA_KEY), old.public_key()
    if not isinstance(public, PublicKey):
        raise UserError(f"{folder / CERTIFICATE}: is none of fedalt certs (ECDSA); renew it as it was made")
    until = min(datetime.now(UTC) + timedelta(days=days), ca.not_valid_after_utc)
    names = dict.fromkeys([*names_of(old), *hosts])
    alternatives = x509.SubjectAlternativeName([_alternative(name) for name in names])
    write_bytes(folder / CERTIFICATE, _server(public, alternatives, until, ca, ca_key).public_bytes(Encoding.PEM))
    return until


def add_key(folder: Path, client: int) -> None:
    """Make the key of one more site."""
    place = folder / SITE_KEYS / f"client_{client}"
    if not place.parent.is_dir():
        raise UserError(f"{place.parent}: no such folder; fedalt certs --out {folder} --sites N makes it")
    if there := [path for path in (place, place.with_name(f"{place.name}.pub")) if path.exists()]:
        raise UserError(f"{there[0]}: exists already; --rotate {client} makes another key")
    _make_key(folder, client)


def rotate_key(folder: Path, client: int) -> None:
    """Make another key for a site; the old one is gone."""
    _public_of(folder, client)
    _make_key(folder, client)


def revoke_key(folder: Path, client: int) -> None:
    """Take a site's key away, both halves as far as they are here."""
    public = _public_of(folder, client)
    if len(site_keys(folder)) == 1:
        raise UserError(f"{public}: is the last key, and a server without any does not start; end the server instead")
    public.unlink()
    public.with_suffix("").unlink(missing_ok=True)


def _public_of(folder: Path, client: int) -> Path:
    public = folder / SITE_KEYS / f"client_{client}.pub"
    if not public.is_file():
        raise UserError(f"{public}: no such key; fedalt certs {folder} --list shows those that there are")
    return public


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        pass
    try:
        if not host or any(c.isspace() or c in ":/" for c in host):
            raise ValueError
        return x509.DNSName(host)
    except ValueError:
        raise UserError(f'--host "{host}": write a name or an IP address, without a port') from None


def _builder(name: str, key: PublicKey, until: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(datetime.now(UTC), until) - _SKEW)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _ca(key: ec.EllipticCurvePrivateKey, until: datetime) -> x509.Certificate:
    return (
        _builder("fedalt trial CA", key.public_key(), until)
        .issuer_name(_name("fedalt trial CA"))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(key, hashes.SHA384())
    )


def _server(
    key: PublicKey,
    alternatives: x509.SubjectAlternativeName,
    until: datetime,
    ca: x509.Certificate,
    ca_key: CertificateIssuerPrivateKeyTypes,
) -> x509.Certificate:
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(cast(PublicKey, ca.public_key()))
    return (
        _builder("fedalt server", key, until)
        .issuer_name(ca.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(alternatives, critical=False)
        .add_extension(issuer, critical=False)
        .sign(ca_key, hashes.SHA384())
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(signs: bool) -> x509.KeyUsage:
    """What a key may sign: certificates, or its own handshakes."""
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write_private(path: Path, key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> None:
    path.parent.mkdir(exist_ok=True)
    path.touch(mode=0o600)
    write_bytes(path, key.private_bytes(Encoding.PEM, form, NoEncryption()), mode=0o600)
