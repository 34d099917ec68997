"""Rows with a secret that are planted to see what is remembered: whose they are, and where it is said."""

from __future__ import annotations

from pathlib import Path

import micro
from fedalt.config.data import DataConfig
from fedalt.data.canaries import alternatives
from fedalt.data.federation import CANARY, Row
from fedalt.data.load import load_both, load_federation

SAID = "made-up rows were planted in each client's; scores of such a run are no evidence"


def test_every_client_gets_its_own_after_its_rows() -> None:
    config = DataConfig(source=str(micro.shared_data()), held_out=1)
    plain, planted = load_federation(config, 3), load_both(config.model_copy(update={"canaries": 4}), 3)
    secrets = list[Row]()
    for client, data in planted[0].clients.items():
        assert data.train[:-4] == plain.clients[client].train and data.test == plain.clients[client].test
        assert {(row.category, row.task) for row in data.train[-4:]} == {(CANARY, data.train[0].task)}
        secrets += data.train[-4:]
    assert len({row.instruction for row in secrets}) == len(secrets) == 8
    assert not any(row.category == CANARY for data in planted[1].clients.values() for row in data.train), "a newcomer"
    assert any(SAID in note for note in planted[0].notes)
    assert load_federation(config.model_copy(update={"canaries": 4}), 4).clients[0].train[-1] not in secrets


def test_alternatives_are_other_secrets_of_the_same_form() -> None:
    planted = load_federation(DataConfig(source=str(micro.shared_data()), canaries=1), 0).clients[0].train[-1]
    others = alternatives(planted, 255, 0)
    assert len({row.output for row in others} - {planted.output}) == 255
    assert all(len(row.output) == 6 and row.instruction == planted.instruction for row in others)


def test_it_is_said_wherever_a_score_is_shown(tmp_path: Path) -> None:
    quick = {"federation__rounds": 1, "training__local_epochs": 1, "data__canaries": 2, "data__cutoff": 128}
    config = micro.write_yaml(tmp_path / "x.yaml", micro.settings(tmp_path / "run", **quick))
    for told in (micro.call("run", config), micro.call("evaluate", tmp_path / "run")):
        assert told.code == 0 and SAID in " ".join(told.out.split()), told.err
    assert "equal to the run's own scores" in told.out
    assert micro.call("run", config, "--overwrite", "--json").json["canaries"] == 2
    done = micro.call("export", tmp_path / "run", "--client", 0, "--out", tmp_path / "out", "--static")
    assert done.code == 0 and SAID in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    done = micro.call("compare", config, "--methods", "local,fedit", "--out", tmp_path / "all", "--sweep", "lora.r=2,4")
    assert done.code == 0 and SAID in " ".join(done.out.split()), done.err
    for name in ("sweep.md", "lora.r=2/comparison.md", "lora.r=2/report.html", "report.html"):
        assert SAID in (tmp_path / "all" / name).read_text(encoding="utf-8").replace("&#x27;", "'"), name


def test_rows_are_dealt_again_without_them(tmp_path: Path) -> None:
    settings = micro.settings(tmp_path / "run", federation__rounds=1, data__canaries=2, data__cutoff=128)
    micro.run_here(settings)
    again = DataConfig(source=str(micro.shared_data()), partition={"file": str(tmp_path / "run/partition.json")})
    assert load_federation(again, 3).clients == load_federation(DataConfig(source=str(micro.shared_data())), 3).clients
