"""Certificates and keys that ``fedalt certs`` makes, looked at with cryptography and tried out with TLS itself."""

import contextlib
import ssl
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedalt.errors import UserError
from fedalt.flower import certs
from fedalt.flower.certs import check_server as check_files
from fedalt.flower.certs import check_site_key, client_keys, make_certs
from fedalt.flower.deploy.address import Address, Connection, UnreachableError, check_server, shown_until
from fedalt.flower.deploy.folders import check_private
from micro import call, refused


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs") / "tls"
    done = call("certs", folder, "--sites", 2, "--host", "fl.example.org", "--host", "10.1.2.3", "--days", 30)
    assert done.code == 0, done.err
    return folder


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def made_days_ago(folder: Path, days: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Certificates of one day, made so many days ago."""
    now = datetime.now(UTC) - timedelta(days=days)

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return now

    with monkeypatch.context() as then:
        then.setattr(certs, "datetime", Clock)
        make_certs(folder, 1, days=1)
    return folder


def test_the_chain_holds_for_every_name_and_for_no_other(made: Path) -> None:
    ca, server = load(made / "ca.crt"), load(made / "server.pem")
    builder = PolicyBuilder().store(Store([ca]))
    names = [x509.DNSName("localhost"), x509.DNSName("fl.example.org")]
    addresses = [x509.IPAddress(ip_address(a)) for a in ("127.0.0.1", "::1", "10.1.2.3")]
    for name in [*names, *addresses]:
        builder.build_server_verifier(name).verify(server, [])
    with pytest.raises(VerificationError):
        builder.build_server_verifier(x509.DNSName("example.org")).verify(server, [])


def test_another_ca_does_not_vouch_for_it(made: Path, tmp_path: Path) -> None:
    make_certs(tmp_path / "other", 1)
    builder = PolicyBuilder().store(Store([load(tmp_path / "other" / "ca.crt")]))
    with pytest.raises(VerificationError):
        builder.build_server_verifier(x509.DNSName("localhost")).verify(load(made / "server.pem"), [])


def test_certificates_end_when_asked(made: Path) -> None:
    for name, days in (("ca.crt", 300), ("server.pem", 30)):
        left = load(made / name).not_valid_after_utc - datetime.now(UTC)
        assert timedelta(days=days - 1) < left <= timedelta(days=days)


def test_only_the_ca_may_sign(made: Path) -> None:
    for name, signs in (("ca.crt", True), ("server.pem", False)):
        extensions = load(made / name).extensions
        assert extensions.get_extension_for_class(x509.BasicConstraints).value.ca is signs
        assert extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is signs


def test_site_keys_are_pairs_that_differ(made: Path) -> None:
    publics = set()
    for site in range(2):
        private = load_ssh_private_key((made / f"keys/client_{site}").read_bytes(), password=None)
        public = load_ssh_public_key((made / f"keys/client_{site}.pub").read_bytes())
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert private.curve.name == "secp384r1"
        assert private.public_key() == public
        publics.add((made / f"keys/client_{site}.pub").read_text())
    assert len(publics) == 2


def test_private_keys_are_for_their_owner_only(made: Path) -> None:
    private = {"ca.key", "server.key", "keys/client_0", "keys/client_1"}
    for path in (p for p in made.rglob("*") if p.is_file()):
        open_to_others = path.stat().st_mode & 0o077
        assert bool(open_to_others) == (str(path.relative_to(made)) not in private), path


def test_keys_are_never_overwritten(made: Path) -> None:
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    assert refused("certs", made, "--sites", 3).startswith(f"{made}: exists already")
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("host", ["https://example.org", "example.org:443", "a b", ""])
def test_a_host_that_is_no_name(tmp_path: Path, host: str) -> None:
    assert f'--host "{host}"' in refused("certs", tmp_path / "tls", "--sites", 1, "--host", host)
    assert not (tmp_path / "tls").exists()


# --------------------------------------------------------------------------------------------------- over months


def test_keys_are_added_rotated_and_revoked(tmp_path: Path) -> None:
    tls = tmp_path / "tls"
    make_certs(tls, 2)
    first = client_keys(tls)
    assert call("certs", tls, "--add", 2).code == call("certs", "--out", tls, "--rotate", 0).code == 0
    then = client_keys(tls)
    assert then.keys() == {0, 1, 2} and then[1] == first[1] and then[0] != first[0]
    for client, public in then.items():
        assert check_site_key(tls / f"keys/client_{client}").public_key() == public
        check_private(tls / f"keys/client_{client}")
    assert "client_1.pub  is gone" in call("certs", tls, "--revoke", 1).out
    assert client_keys(tls).keys() == {0, 2} and not (tls / "keys/client_1").exists()
    assert "exists already; --rotate 2" in refused("certs", tls, "--add", 2)
    assert "no such key" in refused("certs", tls, "--rotate", 1)
    assert call("certs", tls, "--revoke", 0).code == 0
    assert "is the last key" in refused("certs", tls, "--revoke", 2)
    assert "give one of" in refused("certs", tls, "--add", 3, "--renew")
    assert "give one of" in refused("certs", tls)


def test_a_servers_certificate_is_renewed_by_the_ca_that_was_kept(tmp_path: Path) -> None:
    tls = tmp_path / "tls"
    make_certs(tls, 1, ["fl.example.org"], days=10)
    before = call("certs", tls, "--list", "--json").json
    assert [one["days_left"] for one in before["certificates"]] == [99, 9] and before["clients"] == [0]
    assert "note: server.pem ends on" in call("certs", tls, "--list").out
    (tls / "server.key").rename(tmp_path / "server.key")
    assert call("certs", tls, "--renew", "--host", "other.example.org", "--days", 60).code == 0
    (tmp_path / "server.key").rename(tls / "server.key")
    check_files(tls, ["localhost", "127.0.0.1", "fl.example.org", "other.example.org"])
    assert "note" not in call("certs", tls, "--list").out
    assert call("certs", tls, "--renew", "--days", 400).code == 0
    assert call("certs", tls, "--list", "--json").json["certificates"][1]["days_left"] == 99, "not beyond its CA"
    make_certs(tmp_path / "other", 1)
    (tls / "ca.key").write_bytes((tmp_path / "other/ca.key").read_bytes())
    assert "is not the key of" in refused("certs", tls, "--renew")
    (tls / "ca.key").unlink()
    assert refused("certs", tls, "--renew").startswith(f"{tls}/ca.key: cannot be read")


# ------------------------------------------------------------------------------------------- a server's own folder


def test_what_can_be_wrong_with_a_servers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls, other = tmp_path / "tls", tmp_path / "other"
    make_certs(tls, 1)
    make_certs(other, 1)
    serve = ("server", "--tls", tls, "--state", tmp_path / "state", "--address")
    assert refused(*serve, "10.9.9.9:9092").startswith(
        f"{tls / 'server.pem'}: is for localhost, 127.0.0.1, ::1, and not"
    )
    for name, problem in (
        ("server.key", "is not the key of"),
        ("ca.crt", "was not signed by"),
        ("server.pem", "not the key"),
    ):
        own = (tls / name).read_bytes()
        (tls / name).write_bytes((other / name).read_bytes())
        assert problem in refused(*serve, "127.0.0.1:9092")
        (tls / name).write_bytes(b"nonsense")
        assert str(tls / name) in refused(*serve, "127.0.0.1:9092")
        (tls / name).unlink()
        assert refused(*serve, "127.0.0.1:9092") == f"{tls / name}: cannot be read (No such file or directory)"
        (tls / name).write_bytes(own)
        (tls / name).chmod(0o600)
    (tls / "keys" / "client_0.pub").rename(tls / "keys" / "client_0.off")
    assert "no site keys" in refused(*serve, "127.0.0.1:9092")
    old = made_days_ago(tmp_path / "old", 3, monkeypatch)
    assert "expired on" in refused("server", "--tls", old, "--state", tmp_path / "state", "--address", "127.0.0.1:9092")
    assert not (tmp_path / "state").exists()


# --------------------------------------------------------------------------------------- what a site sees of a server


class _Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def listening(tls: Path | None):
    """A web server that answers as a SuperLink does when it is asked whether it is well."""
    server = ThreadingHTTPServer(("0.0.0.0", 0), _Healthy)  # all of 127.0.0.0/8 is loopback
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls / "server.pem", tls / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def test_a_site_trusts_the_server_of_its_ca_and_no_other(made: Path, tmp_path: Path, monkeypatch) -> None:
    make_certs(tmp_path / "other", 1)
    with listening(made) as port:
        check_server(Connection(Address("127.0.0.1", port), made / "ca.crt"))
        check_server(Connection(Address("localhost", port), made / "ca.crt"))
        shown = shown_until(Connection(Address("localhost", port), made / "ca.crt"))
        assert shown == load(made / "server.pem").not_valid_after_utc
        with pytest.raises(UserError, match=r"was not signed by the CA in .*other"):
            check_server(Connection(Address("127.0.0.1", port), tmp_path / "other" / "ca.crt"))
        with pytest.raises(UserError, match=r"for another host, and not for 127\.0\.0\.2"):
            check_server(Connection(Address("127.0.0.2", port), made / "ca.crt"))
        with pytest.raises(UserError, match="does not answer in plain text; a server with TLS needs --ca"):
            check_server(Connection(Address("127.0.0.1", port)))
    old = made_days_ago(tmp_path / "old", 3, monkeypatch)
    with listening(old) as port, pytest.raises(UserError, match="certificate has expired"):
        check_server(Connection(Address("127.0.0.1", port), old / "ca.crt"))


def test_a_server_without_tls(made: Path) -> None:
    with listening(None) as port:
        check_server(Connection(Address("127.0.0.1", port)))
        with pytest.raises(UserError, match="does not speak TLS"):
            check_server(Connection(Address("127.0.0.1", port), made / "ca.crt"))
    with pytest.raises(UnreachableError, match="no server answers"):
        check_server(Connection(Address("127.0.0.1", port)))
