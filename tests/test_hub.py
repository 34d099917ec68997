"""What the hub is asked, and what is said where it cannot be asked. The hubs here are on loopback."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants

from fedalt import hub
from fedalt.config.data import DataConfig
from fedalt.data.load import read_source
from fedalt.errors import UserError
from fedalt.model.source import resolve_source

NOBODY = "http://127.0.0.1:9"  # a port where nothing listens


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub._Ours, "offline", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.chdir(tmp_path)


def refused(model: str) -> str:
    with pytest.raises(UserError) as error:
        resolve_source(model)
    return str(error.value)


def test_a_model_that_nobody_has_is_refused_without_a_second_try() -> None:
    line = refused("nobody/nothing")
    assert line.startswith("model.name: nobody/nothing is no folder here, not in the hub's cache, and " + NOBODY)
    assert "refused" in line.lower()
    assert constants.HF_HUB_OFFLINE, "no library asks again"


@pytest.mark.parametrize("name", ["model.txt", "some/model.safetensors", "a/b/c", "./none", "base.json"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(name: str) -> None:
    assert f"{name} is no model" in refused(name)
    assert not constants.HF_HUB_OFFLINE, "nobody has asked"


def test_a_name_that_was_nearly_right(tmp_path: Path) -> None:
    (tmp_path / "bases" / "llama").mkdir(parents=True)
    assert 'is no folder here (did you mean "llama"?)' in refused("bases/lama")
    assert 'is no folder here (did you mean "tiny-base"?)' in refused("tiny-bas")


def test_rows_that_nobody_has() -> None:
    with pytest.raises(UserError, match=r"nor a data set of the hub that can be had: http://127.0.0.1:9 cannot be"):
        read_source(DataConfig(source="nobody/nothing"))
    with pytest.raises(UserError, match=r"there is no file rows.txt"):
        read_source(DataConfig(source="rows.txt"))


def test_a_hub_that_is_back_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cannot be reached" in hub.out_of_reach()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub.out_of_reach() == ""
        server.shutdown()
    assert not constants.HF_HUB_OFFLINE


def test_who_wants_no_hub_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused("nobody/nothing").endswith("and HF_HUB_OFFLINE is set")
