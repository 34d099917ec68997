"""One site, asked directly: what it does, what it never does again, and what it refuses."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import micro
from fedalt.config import RunConfig, parse_config
from fedalt.errors import UserError
from fedalt.flower.consent import Consent
from fedalt.flower.own import SiteRows
from fedalt.flower.requests import Member, Reply, Request
from fedalt.flower.site import Site
from fedalt.flower.wire import pack, unpack
from fedalt.names import INDIVIDUAL
from fedalt.runs import setup
from fedalt.runs.setup import Bases


@pytest.fixture(scope="module")
def bases() -> Bases:
    return Bases()


def asking(do: Any, tmp_path: Path, round_: int = 0, clients: int = 3, **changes: Any) -> Request:
    values = micro.settings(tmp_path / "server", **{"data__clients": clients, **changes})
    settings = json.dumps(parse_config(values, "s").model_dump(mode="json"))
    return Request(do, "run-1", settings, clients, round_)


def good(reply: Reply) -> Reply:
    assert reply.error is None
    return reply


def joined(reply: Reply) -> Member:
    assert isinstance(reply.body, Member)
    return reply.body


def told(request: Request, upload: bytes, share: float = 1 / 3, counts: int = 1) -> Request:
    """A later request whose mean is, for simplicity, this upload of round 1."""
    return replace(request, told=True, share=share, counts=counts, block=upload)


def site(tmp_path: Path, bases: Bases, client: int = 1, **named: Any) -> Site:
    return Site(client, tmp_path / "state", bases, **{"alone": True, **named})


def lines_of(reply: Callable[[Callable[[str], None]], Reply]) -> tuple[Reply, str]:
    """What the server hears, and what stays in the site's log."""
    lines: list[str] = []
    return reply(lines.append), "\n".join(lines)


def test_a_round_that_is_done_is_not_trained_again(tmp_path: Path, bases: Bases) -> None:
    first = good(site(tmp_path, bases).answer(asking("train", tmp_path, 1)))
    files = micro.tree(tmp_path / "state/run-1/checkpoints")
    lines: list[str] = []
    again = good(site(tmp_path, bases, note=lines.append).answer(asking("train", tmp_path, 1)))  # a new process
    assert (again.block, json.loads(again.header)) == (first.block, json.loads(first.header))
    assert lines[1:] == ["round 1: done before, replied again"], "after what was understood of the rows"
    assert micro.tree(tmp_path / "state/run-1/checkpoints") == files


@pytest.mark.parametrize("wire", ["fp32", "bf16", "int8"])
def test_a_site_remembers_what_the_server_received(wire: str, tmp_path: Path, bases: Bases) -> None:
    mine = site(tmp_path, bases)
    reply = good(mine.answer(asking("train", tmp_path, 1, flower__wire=wire)))
    from fedalt.runs.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(tmp_path / "state/run-1/checkpoints")
    assert checkpoint is not None
    state, received = checkpoint.state(1), unpack(reply.block, wire)  # type: ignore[arg-type]
    assert state.sent is not None and state.sent.keys() == received.keys()
    assert all(torch.equal(value, received[key]) for key, value in state.sent.items())
    own = {key: value for key, value in state.tensors.items() if key.slot == INDIVIDUAL}
    assert all(torch.equal(value, received[key]) for key, value in own.items()) == (wire == "fp32")


def test_a_request_of_an_earlier_round_changes_nothing(tmp_path: Path, bases: Bases) -> None:
    mine = site(tmp_path, bases)
    one = good(mine.answer(asking("train", tmp_path, 1)))
    good(mine.answer(told(asking("train", tmp_path, 2), one.block)))
    files = micro.tree(tmp_path / "state/run-1/checkpoints")
    for do in ("train", "score"):
        reply = mine.answer(asking(do, tmp_path, 1))
        assert (reply.error, reply.count) == ("round", 2)
        assert reply.why == "asked for a round that is over, round 2 is done"
    assert micro.tree(tmp_path / "state/run-1/checkpoints") == files


def test_the_base_is_loaded_once_for_all_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedalt.runs import setup

    load, loaded = setup.load_resident, list[setup.Resident]()

    def counted(config: RunConfig) -> setup.Resident:
        loaded.append(load(config))
        return loaded[-1]

    monkeypatch.setattr(setup, "load_resident", counted)
    mine = site(tmp_path, Bases())
    good(mine.answer(asking("join", tmp_path)))
    one = good(mine.answer(asking("train", tmp_path, 1)))
    good(mine.answer(told(asking("train", tmp_path, 2), one.block)))
    good(mine.answer(replace(asking("train", tmp_path, 1), run="run-2")))
    assert len(loaded) == 1
    other = asking("join", tmp_path, model__name=str(micro.shared_model("llama", seed=5)))
    good(mine.answer(replace(other, run="run-3")))
    assert len(loaded) == 2


def test_rounds_may_be_missed(tmp_path: Path, bases: Bases) -> None:
    mine = site(tmp_path, bases)
    one = good(mine.answer(asking("train", tmp_path, 1)))
    assert good(mine.answer(told(asking("train", tmp_path, 4), one.block))).round == 4
    assert joined(mine.answer(asking("join", tmp_path))).holds == 4


def test_uploads_hold_the_shared_factors_and_nothing_else(tmp_path: Path, bases: Bases) -> None:
    keys = unpack(good(site(tmp_path, bases).answer(asking("train", tmp_path, 1))).block)
    assert {key.slot for key in keys} == {INDIVIDUAL}
    assert {key.factor for key in keys} == {"A", "B"}


def test_replies_hold_no_row_and_no_answer(tmp_path: Path, bases: Bases) -> None:
    mine = site(tmp_path, bases)
    replies = [mine.answer(asking(do, tmp_path, 1)) for do in ("join", "train", "score", "save")]
    text = " ".join(good(reply).header for reply in replies)
    rows = [row for count, start in ((micro.TRAIN, 0), (micro.TEST, 100)) for row in micro.rows(1, count, start)]
    assert not [row["instruction"] for row in rows if row["instruction"] in text]
    assert (tmp_path / "state/run-1/results/eval_client1_round1.jsonl").is_file(), "answers are at the site"
    assert "prediction" not in text


def test_what_a_site_saved_answers_there(tmp_path: Path, bases: Bases) -> None:
    mine = site(tmp_path, bases)
    for do in ("train", "score", "save"):
        good(mine.answer(asking(do, tmp_path, 1)))
    done = micro.call("generate", tmp_path / "state/run-1", "--client", "1", "Is 3 more than 1?")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("changes", "clients", "code", "line"),
    [
        ({"method": "fedalt_averaged_mixer"}, 3, "mixer", "would upload this site's mixer"),
        ({"method": "fedit_split"}, 3, "mixer", "would upload this site's mixer"),
        ({"method": "centralized"}, 3, "pooled", "trains on everybody's rows"),
        ({"data__canaries": 2}, 3, "planted", "plants made-up rows"),
        ({}, 2, "two", "lets each one have the LoRA that the other shares"),
        ({"method": "fedit"}, 2, "two", "lets each one have the LoRA that the other shares"),
        ({"flower__allow_two": True}, 3, "allow_two", "a site that agrees is started with --allow-two"),
        ({"method": "no_such"}, 3, "settings", 'method "no_such" is not held here'),
        ({"data__clients": 1}, 3, "client", "client 1 is not among clients [0]"),
    ],
)
def test_settings_that_are_refused(
    changes: dict[str, Any], clients: int, code: str, line: str, tmp_path: Path, bases: Bases
) -> None:
    request = asking("train", tmp_path, 1, clients, **changes)
    reply, said = lines_of(lambda note: site(tmp_path, bases, note=note).answer(request))
    assert reply.error == code and line in said
    assert not list((tmp_path / "state").rglob("*.safetensors"))


def test_shared_heads_need_consent(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "data__source": str(micro.labelled_data()),
        "model__name": str(micro.shared_classifier()),
        "model__task": "sequence_classification",
        "model__labels": ["large", "middling", "small"],
        "federation__heads": "shared",
    }
    request, bases = asking("train", tmp_path, 1, **changes), Bases()
    assert site(tmp_path, bases).answer(request).error == "heads"
    agreed = site(tmp_path, bases, consent=Consent(frozenset(("heads",))))
    assert "head" in {key.slot for key in unpack(good(agreed.answer(request)).block)}


def test_a_site_needs_no_row_of_the_others_classes(tmp_path: Path) -> None:
    table = tmp_path / "mine.csv"
    table.write_text("text,label\n7,0\n8,0\n9,0\n")
    changes: dict[str, Any] = {
        "data__source": str(micro.labelled_data()),
        "data__label_names": {0: "small", 1: "large"},
        "model__name": str(micro.shared_classifier()),
        "model__task": "sequence_classification",
        "model__labels": ["large", "small"],
    }
    request = asking("train", tmp_path, 1, **changes)
    good(site(tmp_path, Bases(), rows=SiteRows(data=str(table))).answer(request))


def test_two_clients_are_two_if_the_site_agrees(tmp_path: Path, bases: Bases) -> None:
    good(site(tmp_path, bases, consent=Consent(allow_two=True)).answer(asking("train", tmp_path, 1, 2)))


@pytest.mark.parametrize("name", ["../elsewhere", "", "a/b", ".hidden", "x\0", "x\n", "x" * 256])
def test_a_run_is_a_folder_of_the_state_and_no_other(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not what it must be \(run: "):
        Request.parse(replace(asking("join", tmp_path), run=name).header, b"")


def test_other_rows_are_another_run(tmp_path: Path, bases: Bases) -> None:
    good(site(tmp_path, bases).answer(asking("train", tmp_path, 1)))
    other = micro.data_folder(tmp_path / "other", clients=1, train=5)
    changed = site(tmp_path, bases, rows=SiteRows(data=str(other)))
    assert changed.answer(asking("train", tmp_path, 2)).error == "state"


@pytest.mark.parametrize("changes", [{"training__lr": 0.01}, {"method": "fedit"}, {"data__cutoff": 60}])
def test_other_settings_are_another_run(changes: dict[str, Any], tmp_path: Path, bases: Bases) -> None:
    """Or the upload that was made under the first ones would be given again."""
    good(site(tmp_path, bases).answer(asking("train", tmp_path, 1)))
    again = site(tmp_path, bases).answer(asking("train", tmp_path, 1, **changes))
    assert again.error == "state"


def test_how_long_the_server_waits_is_no_matter_of_the_run(tmp_path: Path, bases: Bases) -> None:
    first = good(site(tmp_path, bases).answer(asking("train", tmp_path, 1)))
    changes = {"flower__min_sites": 1, "flower__round_deadline": 5, "federation__rounds": 9}
    again = good(site(tmp_path, bases).answer(asking("train", tmp_path, 1, **changes)))
    assert again.block == first.block


def test_a_site_with_one_client_of_its_own_is_whatever_client_it_is(tmp_path: Path, bases: Bases) -> None:
    whole = good(site(tmp_path, bases).answer(asking("train", tmp_path, 1)))
    alone = tmp_path / "alone"
    micro.write_rows(alone / "train/local_training_0.json", micro.rows(1, micro.TRAIN), False)
    micro.write_rows(alone / "test/local_testing_0.jsonl", micro.rows(1, micro.TEST, 100), True)
    elsewhere = Site(1, tmp_path / "second", bases, SiteRows(data=str(alone), model=str(micro.shared_model())))
    request = asking("train", tmp_path, 1, data__source="somewhere else")
    assert good(elsewhere.answer(request)).block == whole.block


def test_a_client_whose_loss_is_not_finite_keeps_its_state(tmp_path: Path, bases: Bases) -> None:
    mine = site(tmp_path, bases)
    one = good(mine.answer(asking("train", tmp_path, 1)))
    files = micro.tree(tmp_path / "state/run-1/checkpoints")
    bad = pack({key: torch.full_like(value, float("inf")) for key, value in unpack(one.block).items()})
    reply = mine.answer(told(asking("train", tmp_path, 2), bad))
    assert (reply.error, reply.body, reply.block) == ("not_finite", None, b"")
    assert micro.tree(tmp_path / "state/run-1/checkpoints") == files


def test_a_full_disk_is_said_and_the_round_can_be_done_again(tmp_path: Path, bases: Bases) -> None:
    mine = site(tmp_path, bases)
    one = good(mine.answer(asking("train", tmp_path, 1)))
    files = micro.tree(tmp_path / "state/run-1/checkpoints")
    second = told(asking("train", tmp_path, 2), one.block)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # no file may grow beyond
    try:
        reply = mine.answer(second)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert reply.error == "disk"
    assert micro.tree(tmp_path / "state/run-1/checkpoints") == files
    assert good(mine.answer(second)).block
