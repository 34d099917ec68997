"""What holds a state or a key is for its owner only; logs say when, and what is safe."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
from pathlib import Path

import pytest

from fedalt.errors import UserError
from fedalt.files import write_json
from fedalt.flower.certs import make_certs
from fedalt.flower.deploy.address import free_port
from fedalt.flower.deploy.folders import locked, make_private
from flower.test_commands import running, site
from micro import refused


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_everything_made_while_a_folder_is_held_is_private_and_nothing_afterwards(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with locked(tmp_path / "a" / "b", "another"):
            write_json(tmp_path / "a" / "b" / "state.json", {})
            (tmp_path / "elsewhere").mkdir()
        (tmp_path / "after").mkdir()
    finally:
        os.umask(before)
    private = [tmp_path / "a", tmp_path / "a/b", tmp_path / "a/b/state.json", tmp_path / "elsewhere"]
    assert [mode(path) for path in private] == [0o700, 0o700, 0o600, 0o700]
    assert mode(tmp_path / "after") == 0o755


def test_a_loose_state_folder_is_tightened_and_another_folder_is_not_touched(tmp_path: Path) -> None:
    state, other, said = tmp_path / "state", tmp_path / "other", list[str]()
    for folder in (state, other):
        (folder / "inside").mkdir(parents=True)
        (folder / "inside" / "x").touch(mode=0o644)
        (folder / "link").symlink_to("/etc/passwd")
    (state / "site.json").touch(mode=0o664)
    for folder in (state, other):
        folder.chmod(0o755)
    make_private(state, "site.json", said.append)
    assert said == [f"note: --state {state} could be read by others (mode 755); now it is private"]
    assert [mode(path) for path in (state, state / "inside", state / "inside/x")] == [0o700, 0o700, 0o600]
    with pytest.raises(UserError, match=f"^--state {other}: others can read it, and it holds something else"):
        make_private(other, "site.json", said.append)
    assert mode(other) == 0o755 and mode(other / "inside/x") == 0o644
    make_private(state, "site.json", said.append)
    assert len(said) == 1


def test_private_keys_that_others_can_read(tmp_path: Path) -> None:
    make_certs(tmp_path / "tls", 1)
    key, server = tmp_path / "tls/keys/client_0", tmp_path / "tls/server.key"
    assert mode(key) == mode(server) == mode(tmp_path / "tls/ca.key") == 0o600
    key.chmod(0o640)
    line = refused(*site(tmp_path, 0, 9, "--ca", tmp_path / "tls/ca.crt", "--key", key))
    assert line == f"{key}: others can read this private key (mode 640); chmod 600 it"
    server.chmod(0o644)
    line = refused("server", "--tls", tmp_path / "tls", "--state", tmp_path / "s")
    assert line.startswith(f"{server}: others can read this private key (mode 644)")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_a_log_for_machines_and_its_last_line(tmp_path: Path, number: signal.Signals, name: str) -> None:
    with running(tmp_path / "site.log", *site(tmp_path, 0, free_port(), "--log-json")) as waiting:
        waiting.until("waiting for it")
        assert waiting.end(number) == 0
    lines = [json.loads(line) for line in waiting.text.splitlines()]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line["time"]) for line in lines)
    assert lines[0]["line"].startswith("$ flower-supernode ")
    safe = f"ended by {name}: finished rounds are safe in {tmp_path / 'site0'}; start it again to go on"
    assert lines[-1]["line"] == safe
