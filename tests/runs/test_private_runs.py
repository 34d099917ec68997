"""Runs with a privacy budget: one secret a run, a budget that holds, and everything that says what was spent."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import micro
from fedalt.config import parse_config
from fedalt.errors import UserError
from fedalt.methods.registry import build, configured
from fedalt.report.html import write_report
from fedalt.runs import folder as run_folder
from fedalt.runs import rounds as run_rounds
from fedalt.runs.setup import prepare
from fedalt.training.privacy import epsilon
from support import METHODS

PRIVATE: dict[str, Any] = {
    "privacy__epsilon": 5.0,
    "training__local_epochs": 1,
    "evaluation__every": 3,
    "evaluation__max_new_tokens": 2,
}
REFUSED = {
    "pf2lora": "steps of its own kind",
    "centralized": "everybody's rows in one place",
    "zero_shot": "trains nothing",
    "fedalt_heldout_mixer": "held-out rows",
    "hetlora": "lora.ranks",
}


@pytest.fixture
def known_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "token_bytes", lambda size: bytes(range(size)))


def run(out: Path, if_exists: str = "ask", **changes: Any) -> Path:
    micro.run_here(micro.settings(out, **{**PRIVATE, **changes}), if_exists)
    return out


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("private") / "run")


def test_what_was_spent_is_in_the_log_and_in_every_clients_folder(done: Path) -> None:
    clients = micro.of_kind(done, "client")
    assert [event["epsilon"] for event in clients if event["client"] == 0] == sorted(
        event["epsilon"] for event in clients if event["client"] == 0
    )
    for client in range(micro.CLIENTS):
        last = max((event for event in clients if event["client"] == client), key=lambda event: event["round"])
        about = json.loads((done / f"clients/{client}/fedalt_config.json").read_text())["privacy"]
        assert about["epsilon"] == last["epsilon"] <= 5.0 and about["steps"] == 9 and about["delta"] == 1 / 12
        by_hand = epsilon(4 / 12, about["noise_multiplier"], 9, 1 / 12)
        assert about["epsilon"] == by_hand > 4.9 and about["rate"] == 4 / 12
    [note] = [event["text"] for event in micro.of_kind(done, "note") if "privacy:" in event["text"]]
    assert "epsilon at most 5 a client" in note and "in place of training.max_grad_norm" in note
    assert "epsilon, most of a client" in write_report(run_folder.RunFolder(done)).read_text()


def test_a_comparison_has_what_was_spent_beside_what_it_cost(tmp_path: Path) -> None:
    path = micro.write_yaml(tmp_path / "x.yaml", micro.settings(tmp_path, **{**PRIVATE, "federation__rounds": 1}))
    compared = micro.call("compare", path, "--methods", "fedit,ffa_lora", "--out", tmp_path / "out")
    assert compared.code == 0, compared.err
    blocks = json.loads((tmp_path / "out/comparison.json").read_text())["methods"].values()
    assert all(4.9 < block["epsilon"] <= 5 for block in blocks)
    assert "epsilon: most that any client has spent" in (tmp_path / "out/comparison.md").read_text()


def test_no_secret_is_left_and_two_runs_are_unlike(done: Path, tmp_path: Path) -> None:
    assert not (done / "privacy.key").exists()
    again = run(tmp_path / "run")
    one, other = (load_file(path / "clients/0/individual/adapter_model.safetensors") for path in (done, again))
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_was_interrupted_goes_on_to_the_bit(
    tmp_path: Path, known_key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole")
    write, out = run_rounds.Checkpoint.write_manifest, tmp_path / "run"

    def stop(checkpoint: Any, run: str) -> None:
        if checkpoint.round == 2:
            raise KeyboardInterrupt
        write(checkpoint, run)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(run_rounds.Checkpoint, "write_manifest", stop)
        run(out)
    key = out / "privacy.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600 and len(key.read_bytes()) == 32
    monkeypatch.setattr(run_folder, "token_bytes", bytes)  # another key, were it drawn anew
    run(out, "resume")
    (one, log), (other, wanted) = micro.left_behind(out), micro.left_behind(whole)
    del one["config.yaml"], other["config.yaml"]
    assert one == other and log == wanted, "steps of the round that was lost count once"


@pytest.mark.slow
def test_stacked_and_one_after_another_are_alike(tmp_path: Path, known_key: None) -> None:
    ways = [run(tmp_path / how, federation__executor=how) for how in ("stacked", "loop")]
    one, other = map(micro.adapters, ways)
    assert one.keys() == other.keys() and max(float((one[k] - other[k]).abs().max()) for k in one) < 2e-3
    assert [e["epsilon"] for e in micro.of_kind(ways[0], "client")] == [
        e["epsilon"] for e in micro.of_kind(ways[1], "client")
    ]


def test_a_run_ends_before_it_spends_too_much(tmp_path: Path) -> None:
    """The noise is given, and is enough for two rounds of three."""
    budget = 1.001 * epsilon(4 / 12, 1.0, 6, 1 / 12)
    out = run(tmp_path / "run", privacy__epsilon=budget, privacy__noise_multiplier=1.0)
    assert max(event["epsilon"] for event in micro.of_kind(out, "client")) <= budget
    assert len(micro.of_kind(out, "client")) == 2 * micro.CLIENTS
    assert any("privacy.epsilon is spent" in event["text"] for event in micro.of_kind(out, "note"))
    assert json.loads((out / "results/final_scores.json").read_text())["last"]["round"] == 2
    run(out, "resume", privacy__epsilon=budget, privacy__noise_multiplier=1.0)
    assert len(micro.of_kind(out, "client")) == 2 * micro.CLIENTS, "nothing more is spent"
    with pytest.raises(UserError, match=r"no round 1: privacy\.epsilon is spent"):
        run(tmp_path / "none", privacy__epsilon=0.01, privacy__noise_multiplier=1.0)


@pytest.mark.slow
def test_with_a_budget_rounds_are_not_added_and_with_given_noise_they_are(tmp_path: Path) -> None:
    out = run(tmp_path / "budget", federation__rounds=1)
    with pytest.raises(UserError, match="another run"):
        run(out, "resume", federation__rounds=2)
    free = {"privacy__epsilon": None, "privacy__noise_multiplier": 2.0}
    out = run(tmp_path / "noise", federation__rounds=1, **free)
    run(out, "resume", federation__rounds=2, **free)
    assert {event["round"] for event in micro.of_kind(out, "client")} == {1, 2}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_covered_or_refused_by_name(method: str) -> None:
    values = micro.settings(Path("x"), **PRIVATE, method=method)
    config = configured(parse_config(values, "x"), method)
    if why := REFUSED.get(method):
        with pytest.raises(UserError, match=f"^privacy: .*{why}"):
            build(config, 3)
    else:
        assert build(config, 3).private_phases >= 3


def test_unequal_ranks_are_refused() -> None:
    values = micro.settings(Path("x"), **PRIVATE, method="local", lora__ranks=[2, 4])
    with pytest.raises(UserError, match=r"^privacy: lora\.ranks"):
        build(configured(parse_config(values, "x"), "local"), 3)


def test_every_row_counts_once_for_every_phase(tmp_path: Path) -> None:
    """FedDPA-T trains one LoRA in the first round and two in every other."""
    experiment = prepare(parse_config(micro.settings(tmp_path, **PRIVATE, method="feddpa_t"), "x"))
    assert experiment.method.private_phases == 5
    noise = experiment.noise(0)
    assert noise and epsilon(noise.rate, noise.multiplier, 5 * 3, noise.delta) <= 5.0
    assert epsilon(noise.rate, noise.multiplier, 5 * 3 + 1, noise.delta) > 5.0
    assert any("looks at rows again" in note for note in experiment.notes)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"clip": 2.0}, "privacy.clip: without privacy.epsilon or privacy.noise_multiplier"),
        ({"epsilon": 0}, "privacy.epsilon"),
        ({"epsilon": 1, "delta": 1}, "privacy.delta"),
        ({"epsilon": 1, "sampling": "shuffle"}, "privacy.sampling"),
        ({"epsilon": 1, "noise": 1}, "privacy.noise"),
    ],
)
def test_what_is_wrong_is_one_line(values: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_config({"privacy": values}, "x.yaml")
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_orders_of_rows_are_refused() -> None:
    for key, value in (("order", "bucketed"), ("repeat_order", True)):
        with pytest.raises(UserError, match=rf"training\.{key}: privacy samples"):
            parse_config({"privacy": {"epsilon": 1}, "training": {key: value}}, "x")


def test_heads_are_covered_too(tmp_path: Path) -> None:
    out = run(
        tmp_path / "run",
        data__source=str(micro.labelled_data()),
        model__name=str(micro.shared_classifier()),
        model__task="sequence_classification",
        method="fedit",
        federation__heads="shared",
    )
    assert len(micro.of_kind(out, "client")) == 9 and micro.of_kind(out, "client")[0]["epsilon"] > 0


def test_validate_and_estimate_know_it(tmp_path: Path) -> None:
    path = micro.write_yaml(tmp_path / "x.yaml", micro.settings(tmp_path / "run", **PRIVATE))
    done = micro.call("validate", path)
    assert done.code == 0 and "epsilon at most 5 a client" in done.out + done.err
