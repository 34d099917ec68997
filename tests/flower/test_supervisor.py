"""A site that cannot go on says why in one line, and does not try again."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedalt.errors import UserError
from fedalt.flower.deploy.address import Connection, parse_address
from fedalt.flower.deploy.node import HEARD
from fedalt.flower.deploy.processes import ProcessEvent, Watch
from fedalt.flower.deploy.supervisor import Site, _Supervisor
from fedalt.flower.trainer import WRONG


def supervisor(state: Path) -> Any:
    site = Site(Connection(parse_address("127.0.0.1:1", "--server")), 0, state, 1.0)
    return _Supervisor(site, lambda line: None, Watch())


def test_a_state_folder_that_takes_no_file_any_more(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(UserError, match="state/online: cannot write here"):
        supervisor(tmp_path / "state")._read(ProcessEvent("line", "flower-supernode", "INFO : SuperNode ID: 7\n"))


def test_a_trainer_that_cannot_begin_is_not_started_again(tmp_path: Path) -> None:
    one = supervisor(tmp_path)
    one._read(ProcessEvent("line", "trainer", "error: state/trainer.json: disk full (File too large)\n"))
    ended = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({WRONG})"], text=True)
    ended.wait()
    one.processes["trainer"] = ended
    with pytest.raises(UserError, match=r"^trainer: state/trainer.json: disk full \(File too large\)$"):
        one._revive("trainer")


def test_a_node_is_left_alone_while_no_server_answers(tmp_path: Path) -> None:
    one = supervisor(tmp_path)  # nothing listens at its server's port
    one.heard -= 100
    one._listen()
    assert not one.silent
    assert time.monotonic() - one.heard == pytest.approx(15, abs=5), "and asked for again in half a minute"


def test_a_heartbeat_is_no_line_of_the_log(tmp_path: Path) -> None:
    said: list[str] = []
    one = supervisor(tmp_path)
    one.tell, one.heard = said.append, 0.0
    one._read(ProcessEvent("line", "flower-supernode", f"{HEARD}\n"))
    assert one.heard > 0 and not said
