"""A site that cannot go on says why in one line, and does not try again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedalt.errors import UserError
from fedalt.flower.deploy.address import Connection, parse_address
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
