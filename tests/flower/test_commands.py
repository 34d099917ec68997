"""``fedalt server``, ``site``, ``submit`` and ``status``: real processes of Flower's on loopback."""

from __future__ import annotations

import contextlib
import getpass
import http.client
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedalt.files import write_json
from fedalt.flower.certs import make_certs
from fedalt.flower.deploy.address import Address, check_free, free_port, parse_address
from fedalt.flower.deploy.folders import locked
from fedalt.flower.deploy.processes import shortened
from micro import ENVIRONMENT, call, events, refused, settings, shared_data, shared_model, write_yaml

PATIENCE = 240.0
"""Seconds; machines may be slow."""
CLI = (sys.executable, "-c", "from fedalt.cli import main; main()")


class Process:
    """A command that goes on until it is told to end, and what it has printed so far."""

    def __init__(self, log: Path, *arguments: object) -> None:
        self.log = log
        with log.open("wb") as file:
            self.popen = subprocess.Popen(
                [*CLI, *map(str, arguments)],
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=log.parent,
                env=os.environ | ENVIRONMENT,
            )

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def until(self, pattern: str, count: int = 1) -> str:
        """Wait until a pattern has been printed so many times."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            ended = self.popen.poll() is not None
            found = re.findall(pattern, self.text)
            if len(found) >= count:
                return str(found[-1])
            assert not ended, self.text
            time.sleep(0.1)
        raise AssertionError(f"no {pattern!r} in:\n{self.text}")

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.popen.pid).children(recursive=True)

    def child(self, part: str) -> psutil.Process:
        """The one process below this whose command line holds a word; its own children may repeat it."""
        return next(p for p in psutil.Process(self.popen.pid).children() if any(part in word for word in p.cmdline()))

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(60)


def gone(processes: list[psutil.Process]) -> bool:
    """Whether all end within a minute (one may just be starting); one that nobody has reaped yet has ended."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
            return True
        time.sleep(0.1)
    return False


@contextlib.contextmanager
def running(log: Path, *arguments: object) -> Iterator[Process]:
    process = Process(log, *arguments)
    try:
        yield process
    finally:
        below = process.children() if process.popen.poll() is None else []
        process.end()
        assert gone(below), below


def site(folder: Path, client: int, port: int, *more: object) -> tuple[object, ...]:
    return ("site", "--server", f"127.0.0.1:{port}", "--client-id", client, "--state", folder / f"site{client}", *more)


# ------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    "text", ["9092", "localhost", "https://x:1", "x:port", "x:0", "x:65536", ":1", "::1:9092", "a b:1"]
)
def test_an_address_that_is_none(tmp_path: Path, text: str) -> None:
    for command, flag in ((("server",), "--address"), (("status",), "--server")):
        assert refused(*command, flag, text).startswith(f'{flag} "{text}": write HOST:PORT')
    line = refused("site", "--client-id", 0, "--state", tmp_path / "s", "--server", text)
    assert line.startswith(f'--server "{text}"')
    assert not (tmp_path / "s").exists()


def test_addresses_with_names_and_brackets() -> None:
    for text in ("127.0.0.1:9092", "fl.example.org:443", "[::1]:9092"):
        assert str(parse_address(text, "--server")) == text
    assert parse_address("[::1]:9092", "--server").host == "::1"
    assert str(Address("::", 1).local) == "[::1]:1"


def test_an_address_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused("server", "--address", f"127.0.0.1:{port}", "--state", tmp_path / "s")
        assert line.startswith(f"--address 127.0.0.1:{port}: something listens there already")
    check_free(Address("127.0.0.1", port), "--address")
    assert "no address of this machine" in refused("server", "--address", "192.0.2.1:9092", "--state", tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_settings_are_checked_before_a_server_starts(tmp_path: Path) -> None:
    values = settings(tmp_path / "run")
    line = refused("server", write_yaml(tmp_path / "x.yaml", values | {"method": "fedallt"}))
    assert 'did you mean "fedalt"' in line
    line = refused("server", write_yaml(tmp_path / "x.yaml", values | {"lora": {"rnk": 4}}))
    assert line.startswith(f'{tmp_path / "x.yaml"}: unknown key "lora.rnk"')
    assert refused("server", write_yaml(tmp_path / "y.yaml", values)).startswith("data.clients: say how many sites")


def test_files_that_a_site_lacks(tmp_path: Path) -> None:
    make_certs(tmp_path / "tls", 1)
    ca, key = tmp_path / "tls" / "ca.crt", tmp_path / "tls" / "keys" / "client_0"
    wrong: dict[tuple[object, ...], str] = {
        ("--data", tmp_path / "rows"): f"--data {tmp_path / 'rows'}: no such folder or file here",
        ("--key", key): "--key needs --ca FILE: Flower checks a site's key over TLS only",
        ("--ca", tmp_path / "no.crt"): f"{tmp_path / 'no.crt'}: cannot be read (No such file or directory)",
        ("--ca", ca, "--key", tmp_path / "no"): f"{tmp_path / 'no'}: cannot be read (No such file or directory)",
        ("--ca", ca, "--key", f"{key}.pub"): f"{key}.pub: no private key in OpenSSH's format",
        ("--ca", key): f"{key}: no certificate in PEM format",
        ("--ca", ca, "--insecure"): "--insecure and --ca exclude each other",
        ("--share", "mixr"): '--share: "mixr" is unknown (did you mean "mixer"?); known: mixer, heads',
        ("--device", "gpu"): "--device",
    }
    for more, line in wrong.items():
        assert refused(*site(tmp_path, 0, 9, *more)).startswith(line)
    assert not (tmp_path / "site0").exists()


def test_a_state_folder_of_another_client_or_of_something_else(tmp_path: Path) -> None:
    write_json(tmp_path / "site1" / "site.json", {"client": 0})
    line = refused(*site(tmp_path, 1, 9))
    assert line.startswith(f"--state {tmp_path / 'site1'}: holds the private state of client 0, not of client 1")
    (tmp_path / "site2").mkdir()
    (tmp_path / "site2" / "thesis.doc").touch()
    assert "not empty and no site's state folder" in refused(*site(tmp_path, 2, 9))
    (tmp_path / "site3").touch()
    assert "cannot write here" in refused(*site(tmp_path, 3, 9))


def test_two_sites_on_one_state_folder(tmp_path: Path) -> None:
    with locked(tmp_path / "site0", "another fedalt site"):
        line = refused(*site(tmp_path, 0, 9))
    assert (
        line
        == f"--state {tmp_path / 'site0'}: another fedalt site uses this folder now; end it or choose another folder"
    )


def test_nobody_there(tmp_path: Path) -> None:
    port = free_port()
    config = write_yaml(tmp_path / "x.yaml", settings(tmp_path / "run", data__clients=3))
    for command in (("status",), ("submit", config)):
        assert refused(*command, "--server", f"127.0.0.1:{port}").startswith(f"127.0.0.1:{port}: no server answers")
    with running(tmp_path / "site.log", *site(tmp_path, 0, port)) as waiting:
        waiting.until("no server answers .*; waiting for it")
        assert waiting.end() == 0


def test_flower_is_not_installed() -> None:
    hide = "import sys; sys.modules.update(dict.fromkeys(['flwr', 'cryptography', 'tomli_w']))"
    commands: list[list[str]] = [
        ["certs", "x", "--sites", "1"],
        ["server"],
        ["site", "--client-id", "0", "--state", "x"],
        ["submit"],
        ["status"],
    ]
    for command in commands:
        code = f"{hide}; from fedalt.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert re.fullmatch(r"error: .* need pip install 'fedalt\[flower\]' \(\w+ is missing\)\n", done.stderr)
    assert call("--help").code == 0


# ----------------------------------------------------------------------------------------------------- Flower's own log


@pytest.mark.parametrize(
    ("line", "short"),
    [
        ("\x1b[92mINFO \x1b[0m:      Starting Flower SuperNode\n", "Starting Flower SuperNode"),
        ('2026-11-25T16:36:13.646Z INFO [uvicorn.access] 127.0.0.1:4 - "POST /v1/fleet/get-run HTTP/1.1" 200\n', None),
        ("\x1b[92mINFO \x1b[0m:      \n", None),
        ("\x1b[92mINFO \x1b[0m:      Receiving: train message (ID: 3f9c)\n", "Receiving: train message"),
        ("\x1b[91mERROR \x1b[0m:     error: x.yaml: wrong\n", "error: x.yaml: wrong"),
        ("\x1b[93mWARNING \x1b[0m:   something odd\n", "something odd"),
        ("a ClientApp's own line\n", "a ClientApp's own line"),
        ("╭─ Error ────────╮\n", None),
        ("│ Connection to the SuperLink is unavailable.  │\n", "Connection to the SuperLink is unavailable."),
    ],
)
def test_flowers_log_shortened(line: str, short: str | None) -> None:
    assert shortened(line) == short


# ------------------------------------------------------------------------------------------------------- real processes


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int, Process]]:
    """A server with TLS and authentication, with settings and with keys of three sites."""
    folder, port = tmp_path_factory.mktemp("federation"), free_port()
    make_certs(folder / "tls", 3)
    config = write_yaml(folder / "x.yaml", settings(folder / "run", data__clients=3))
    serve = ("server", config, "--address", f"127.0.0.1:{port}", "--tls", folder / "tls", "--state", folder / "server")
    with running(folder / "server.log", *serve) as server:
        server.until("at site N: ")
        yield folder, port, server


def secure(folder: Path, client: int) -> tuple[object, ...]:
    return ("--ca", folder / "tls" / "ca.crt", "--key", folder / "tls" / "keys" / f"client_{client}")


def test_the_server_says_what_it_does_and_what_a_site_has_to_do(federation) -> None:
    folder, port, server = federation
    tls = folder / "tls"
    assert f"$ flower-superlink --ssl-ca-certfile {tls}/ca.crt" in server.text
    assert "--enable-supernode-auth" in server.text
    assert "flwr supernode register: 3 new keys; may join: client_0, client_1, client_2" in server.text
    line = f"fedalt site --server 127.0.0.1:{port} --client N --data DIR --state DIR --ca {tls}/ca.crt"
    assert f"{line} --key {tls}/keys/client_N" in server.text


def test_a_site_joins_is_seen_and_leaves(federation, tmp_path: Path) -> None:
    folder, port, _ = federation
    ask = ("status", "--server", f"127.0.0.1:{port}", "--ca", folder / "tls" / "ca.crt", "--json")
    more = ("--data", shared_data(), "--share", "mixer", *secure(folder, 0))
    with running(tmp_path / "site.log", *site(tmp_path, 0, port, *more)) as joined:
        joined.until("SuperNode ID: ")
        seen = call(*ask, "--state", folder / "server").json
        expected = {"client_0": "online", "client_1": "registered", "client_2": "registered"}
        assert {one["site"]: one["status"] for one in seen["sites"]} == expected
        assert seen["runs"] == []
        table = call(*ask[:-1]).out
        assert "online" in table and "registered" in table
        said = ["$ flwr supernode list fedalt --format json", "$ flwr list fedalt --format json"]
        assert table.splitlines()[:2] == said and call(*ask).err.splitlines() == said
        trust = f"--root-certificates {folder}/tls/ca.crt --auth-supernode-private-key {folder}/tls/keys/client_0"
        line = f"$ flower-supernode {trust} --superlink 127.0.0.1:{port} --node-config 'client-id=0 state="
        assert joined.text.split(" ", 1)[1].startswith(line), "after the time"
        assert "another fedalt site uses this folder" in refused(*site(tmp_path, 0, port, *more))
        below = joined.children()
        assert len(below) >= 3, "SuperNode, SuperExec, trainer"
        lines = [line for process in below for line in process.net_connections("inet")]
        assert {line.laddr.ip for line in lines if line.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
        assert joined.end() == 0
        assert gone(below)
    assert "offline" in call(*ask).out
    with running(tmp_path / "site.log", *site(tmp_path, 0, port, *more)) as again:
        again.until("SuperNode ID: ")
        assert "does not let this site in" not in again.text


def test_a_trainer_that_dies_is_started_again_and_a_killed_site_leaves_nothing(federation, tmp_path: Path) -> None:
    folder, port, _ = federation
    with running(tmp_path / "site.log", *site(tmp_path, 1, port, *secure(folder, 1))) as joined:
        joined.until("SuperNode ID: ")
        joined.child("fedalt.flower.trainer").kill()
        joined.until(r"trainer: ended \(signal 9\); starting it again")
        time.sleep(1.5)
        joined.child("fedalt.flower.trainer")
        joined.child("fedalt.flower.deploy.node").kill()
        joined.until(r"flower-supernode: ended \(signal 9\); starting it again")
        joined.until("does not let this site in: .* for 90 s")
        below = joined.children()
        joined.end(signal.SIGKILL)
        assert gone(below), below


def test_a_wrong_ca_and_no_encryption_are_refused(federation, tmp_path: Path) -> None:
    folder, port, _ = federation
    make_certs(tmp_path / "other", 1)
    wrong = ("--ca", tmp_path / "other" / "ca.crt", "--key", folder / "tls" / "keys" / "client_0")
    assert "was not signed by the CA in" in refused(*site(tmp_path, 0, port, *wrong))
    assert "a server with TLS needs --ca FILE" in refused(*site(tmp_path, 0, port))
    config = write_yaml(tmp_path / "x.yaml", settings(tmp_path / "run", data__clients=3))
    submit = ("submit", config, "--server", f"127.0.0.1:{port}")
    assert "was not signed by the CA in" in refused(*submit, "--ca", tmp_path / "other" / "ca.crt")
    assert "was not signed by the CA in" in refused(*submit, "--tls", tmp_path / "other")
    assert "a server with TLS needs --ca FILE" in refused(*submit)


@pytest.mark.slow
def test_a_server_that_is_killed_leaves_nothing_and_its_run_can_be_resumed(tmp_path: Path) -> None:
    port = free_port()
    config = write_yaml(tmp_path / "x.yaml", settings(tmp_path / "run", data__clients=3))
    serve = ("server", "--address", f"127.0.0.1:{port}", "--state", tmp_path / "server")
    with running(tmp_path / "server.log", *serve) as server:
        server.until("at site N: ")
        with running(tmp_path / "submit.log", "submit", config, "--server", f"127.0.0.1:{port}") as run:
            run.until("flwr run: run ")
            assert re.match(r"\$ flwr list fedalt --format json\n\$ flwr run \S+ fedalt --stream\n", run.text)
            server.until("Started task")
            below = server.children()
            server.end(signal.SIGKILL)
            assert gone(below), below
            assert run.popen.wait(PATIENCE) == 1
            last = run.text.splitlines()[-1]
            assert last.startswith(f"error: 127.0.0.1:{port}: ")
            assert last.endswith("finished rounds are safe, submit it again with --resume")


def test_a_public_door_is_for_sites_only(tmp_path: Path) -> None:
    inside, outside = free_port(), free_port()
    make_certs(tmp_path / "tls", 1, days=10)
    places = ("--address", f"127.0.0.1:{inside}", "--public", f"127.0.0.1:{outside}")
    serve = ("server", *places, "--tls", tmp_path / "tls", "--state", tmp_path / "server")
    ca = ("--ca", tmp_path / "tls" / "ca.crt")
    with running(tmp_path / "server.log", *serve) as server:
        server.until(f"at site N: fedalt site --server 127.0.0.1:{outside} ")
        with running(tmp_path / "site.log", *site(tmp_path, 0, outside, *secure(tmp_path, 0))) as joined:
            joined.until("SuperNode ID: ")
            seen = call("status", "--server", f"127.0.0.1:{inside}", *ca).out
            assert "online" in seen
            note = r"^note: server.pem ends on \S+, in 9 days: fedalt certs DIR --renew, and start the server again$"
            assert re.search(note, seen, re.MULTILINE) and server.text.count("note: server.pem ends on") == 1
            assert "403" in refused("status", "--server", f"127.0.0.1:{outside}", *ca)
        unverified = ssl._create_unverified_context()
        for path in (
            "control/start-run",
            "control/register-node",
            "runtime/acquire-task",
            "fleet/../control/list-runs",
        ):
            line = http.client.HTTPSConnection("127.0.0.1", outside, context=unverified)
            line.request("POST", f"/v1/{path}", b"", {"Content-Type": "application/protobuf"})
            assert line.getresponse().status == 403, path
            line.close()


def test_a_public_door_needs_tls(tmp_path: Path) -> None:
    line = refused("server", "--public", f"127.0.0.1:{free_port()}", "--state", tmp_path / "s")
    assert line.startswith("--public needs --tls DIR")


def test_runs_are_submitted_on_loopback_only(tmp_path: Path) -> None:
    """Except without TLS, where nothing is protected and a note says so."""
    make_certs(tmp_path / "tls", 1, ["192.0.2.1"])
    serve = ("server", "--tls", tmp_path / "tls", "--state", tmp_path / "s", "--address")
    for more in ((), ("--public", f"127.0.0.1:{free_port()}")):
        for host in ("0.0.0.0", "192.0.2.1"):
            assert "whoever reaches it can submit runs" in refused(*serve, f"{host}:{free_port()}", *more)
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_an_unregistered_key_is_refused(federation, tmp_path: Path) -> None:
    folder, port, _ = federation
    make_certs(tmp_path / "other", 1)
    key = tmp_path / "other" / "keys" / "client_0"
    line = refused(*site(tmp_path, 0, port, "--ca", folder / "tls" / "ca.crt", "--key", key))
    assert line.startswith(
        f"127.0.0.1:{port}: the server does not let {key} in: the key's public half is not registered"
    )
    line = refused(*site(tmp_path, 1, port, "--ca", folder / "tls" / "ca.crt"))
    assert line.startswith(f"127.0.0.1:{port}: this server lets in only sites whose key it knows")


@pytest.mark.slow
def test_a_key_that_was_taken_out_may_not_join_again(tmp_path: Path) -> None:
    port = free_port()
    make_certs(tmp_path / "tls", 2)
    serve = ("server", "--address", f"127.0.0.1:{port}", "--tls", tmp_path / "tls", "--state", tmp_path / "server")
    with running(tmp_path / "server.log", *serve) as server:
        server.until("at site N: ")
    (tmp_path / "tls" / "keys" / "client_1.pub").unlink()
    with running(tmp_path / "server.log", *serve) as server:
        server.until("at site N: ")
        assert "unregister: client_1 may not join any more" in server.text
        assert "0 new keys; may join: client_0\n" in server.text
        line = refused(*site(tmp_path, 1, port, *secure(tmp_path, 1)))
        assert "public half is not registered there" in line


@pytest.mark.slow
def test_keys_take_effect_without_a_restart(tmp_path: Path) -> None:
    inside, outside, tls = free_port(), free_port(), tmp_path / "tls"
    make_certs(tls, 1)
    places = ("--address", f"127.0.0.1:{inside}", "--public", f"127.0.0.1:{outside}")
    ask = ("status", "--server", f"127.0.0.1:{inside}", "--ca", tls / "ca.crt", "--state", tmp_path / "server")
    with running(tmp_path / "server.log", "server", *places, "--tls", tls, "--state", tmp_path / "server") as server:
        server.until("at site N: ")
        assert call("certs", tls, "--add", 1).code == 0
        server.until("1 new keys; may join: client_0, client_1\n")
        key = ("--ca", tls / "ca.crt", "--key", tmp_path / "client_1")
        (tls / "keys/client_1").rename(tmp_path / "client_1")
        with running(tmp_path / "site.log", *site(tmp_path, 1, outside, *key)) as joined:
            joined.until("SuperNode ID: ")
            assert call("certs", tls, "--revoke", 1).code == 0
            server.until("unregister: client_1 may not join any more")
            assert [node["site"] for node in call(*ask, "--json").json["sites"]] == ["client_0"]
        (tls / "keys/client_0.pub").write_bytes(b"nonsense")
        server.until("note: who may join is as it was: .*no public key")


@pytest.mark.slow
def test_a_run_across_sites(federation, tmp_path: Path) -> None:
    folder, port, _ = federation
    config = write_yaml(tmp_path / "x.yaml", settings(tmp_path / "run", data__clients=3, training__local_epochs=1))
    submit = ("submit", config, "--server", f"127.0.0.1:{port}", "--tls", folder / "tls")
    own = ("--data", shared_data(), "--model", shared_model(), "--set", "min_rows=1")
    with contextlib.ExitStack() as stack:
        for i in range(3):
            trust = secure(folder, i)
            stack.enter_context(running(tmp_path / f"{i}.log", *site(tmp_path, i, port, *trust, *own)))
        run = stack.enter_context(running(tmp_path / "submit.log", *submit))
        assert run.popen.wait(PATIENCE) == 0, run.text
        assert f": submitted by {getpass.getuser()}@{socket.gethostname()}\n" in run.text
        assert "finished: ROUGE-1, mean" in run.text
        assert run.text.count("$ flwr list fedalt --format json") == 2, "before, and until it has ended"
        assert "scores after round 3" in run.text
        assert [event["round"] for event in events(tmp_path / "run") if event["event"] == "round"] == [1, 2, 3]
        assert "holds a run already; add --resume" in refused(*submit)
        done = call(*submit, "--resume", "--json")
        assert done.code == 0, done.err
        assert done.json["last"]["round"] == 3
        ca = folder / "tls" / "ca.crt"
        status = call("status", "--server", f"127.0.0.1:{port}", "--ca", ca, "--json").json
        ended = ["finished:completed", "finished:failed", "finished:completed"]
        assert [one["status"] for one in status["runs"]] == ended
