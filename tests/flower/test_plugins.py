"""A method of somebody's own across sites: each machine holds the file, and none is ever sent or pointed at."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import micro
from fedalt.config import parse_config, parse_received
from fedalt.errors import UserError
from fedalt.flower.requests import Member, Reply, Request
from fedalt.flower.server_app import serve
from fedalt.registry import HELD, METHODS, hold_plugins
from fedalt.runs.setup import Bases
from flower.grid import LocalGrid
from flower.test_parity import across, on_one_machine, site_files

CODE = '''
from fedalt.methods.base import Method, squared_distance
from fedalt.registry import METHODS
from fedalt.config.section import Section


@METHODS.register("{name}")
class Pulled(Method):
    """FedIT, pulled to where the round began."""

    class Settings(Section):
        weight: float = {weight}

    def penalty(self, trained, start):
        return self.settings.weight * squared_distance(trained, start)
'''


@pytest.fixture(scope="module")
def bases() -> Bases:
    return Bases()


def held(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, weight: float = 0.5) -> Path:
    path = folder / f"{name}.py"
    path.write_text(CODE.format(name=name, weight=weight))
    monkeypatch.setenv(HELD, "")
    hold_plugins([str(path)])
    return path


def test_sites_that_hold_the_file_end_as_one_machine_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bases: Bases
) -> None:
    held(tmp_path, monkeypatch, "pulled_far")
    grid, _ = across(tmp_path / "far", bases, method="pulled_far", pulled_far__weight=2.0)
    here = on_one_machine(tmp_path / "here", method="pulled_far", pulled_far__weight=2.0)
    there = {name: data for name, data in micro.tree(here / "clients").items() if name.endswith(".safetensors")}
    assert there
    far = {name.removeprefix("clients/"): data for name, data in site_files(grid, "clients").items()}
    assert there.items() <= far.items()


def test_settings_on_the_way_hold_neither_code_nor_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bases: Bases
) -> None:
    path = held(tmp_path, monkeypatch, "pulled_way")
    values = micro.settings(tmp_path / "run", data__clients=3, method=f"{path}:Pulled", federation__rounds=1)
    config = parse_config(values, "s")
    assert config.plugins == (str(path),)
    grid = LocalGrid(tmp_path / "sites", range(3), bases)
    serve(grid, config.portable(), "ask", lambda event: None)
    assert grid.seen
    for _, request in grid.seen:
        assert request.do == "who" or json.loads(request.settings)["method"] == "pulled_way"
        assert str(path) not in request.settings and "squared_distance" not in request.settings


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"plugins": ["x.py"]}, "refused: plugins point at code"),
        ({"plugins": ["os"]}, "refused: plugins point at code"),
        ({"method": "x.py:Name"}, "refused: method points at code"),
        ({"method": "os:system"}, "refused: method points at code"),
        ({"evaluation": {"metrics": ["rouge1", "x.py:Name"]}}, r"refused: evaluation\.metrics points at code"),
        *(
            ({"fedalt": {key: "x.py:Name"}}, r"refused: fedalt\.rest_of_world_aggregator points at code")
            for key in ("rest_of_world_aggregator", "row_aggregator")
        ),
        ({"method": "nobodys"}, 'refused: method "nobodys" is not held here'),
    ],
)
def test_settings_from_elsewhere_never_point_at_code(values: dict[str, object], line: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=line):
        parse_received(values, "the server's settings")


def test_a_site_finds_what_its_file_does_not_register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server has named it by FILE.py:Name; settings on the way have the name alone."""
    path = tmp_path / "plain.py"
    path.write_text("from fedalt.methods.base import Method\n\n\nclass PlainMean(Method):\n    pass\n")
    monkeypatch.setenv(HELD, "")
    hold_plugins([str(path)])
    received = parse_received({"method": "plain_mean"}, "the server's settings")
    assert received.method == "plain_mean" and METHODS.entry("plain_mean").origin == f"file {path}"


def test_a_site_whose_file_is_another_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bases: Bases
) -> None:
    """All sites share this process, so the third one's answer is changed on its way."""
    held(tmp_path, monkeypatch, "pulled_odd")
    ours = METHODS.entry("pulled_odd")

    def other(client: int, request: Request, reply: Reply) -> Reply:
        if client == 2 and request.do == "join":
            assert isinstance(reply.body, Member)
            common = replace(reply.body.common, code=(("method pulled_odd", "f" * 64),))
            return replace(reply, body=replace(reply.body, common=common))
        return reply

    values = micro.settings(tmp_path / "run", data__clients=3, method="pulled_odd", flower__min_sites=2)
    grid = LocalGrid(tmp_path / "sites", range(3), bases)
    grid.tamper = other
    serve(grid, parse_config(values, "s").portable(), "ask", lambda event: None)
    said = [e["reason"] for e in micro.events(tmp_path / "run") if e["event"] == "client_failed"]
    assert ours.digest
    line = f"its file with method pulled_odd is {'f' * 12}, this run's is {ours.digest[:12]}"
    assert any(line in one for one in said)
