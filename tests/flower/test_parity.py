"""The same settings on one machine and across sites give the same adapters and the same run folder, by any method."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import micro
from fedalt.config import parse_config
from fedalt.flower.consent import Consent
from fedalt.flower.messages import reply_in, request_in
from fedalt.flower.server_app import serve
from fedalt.methods.registry import get_method
from fedalt.model.state import load_state
from fedalt.names import Key
from fedalt.runs.setup import Bases
from flower.grid import LocalGrid
from flower.wired import raw, size, wired
from support import METHODS, VARIANTS

OF_MANY = ("fedalt_trimmed_mean", "fedalt_krum")
"""Refused with three clients; ``fedalt_median`` takes their way."""
METHODS_HERE = [name for name in (*METHODS, *VARIANTS) if not get_method(name).centralised and name not in OF_MANY]
AGREED = Consent(frozenset(("mixer",)), allow_two=True)
"""FedIT-split averages its routers, an ablation of FedALT its mixers; see test_site.py for what happens without."""
CHANGES: dict[str, dict[str, Any]] = {
    "pf2lora": {"pf2lora__private_lr": 0.02},  # at its default of 2 here a last digit becomes another model
    "hetlora": {"lora__ranks": [2, 4, 4]},
    "zero_pad": {"lora__ranks": [2, 4, 4]},
    "flexlora": {"lora__ranks": [2, 4, 4]},
    "flora": {"lora__ranks": [2, 4, 4]},
}


CLASSIFIERS: dict[str, Any] = {
    "data__source": str(micro.labelled_data()),
    "model__name": str(micro.shared_classifier()),
    "model__task": "sequence_classification",
    "model__labels": ["large", "middling", "small"],
}


@pytest.fixture(scope="module")
def bases() -> Bases:
    return Bases()


def changes_of(method: str) -> dict[str, Any]:
    return {"method": method, "federation__rounds": 2, "evaluation__every": 2, **CHANGES.get(method, {})}


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory, bases: Bases) -> Callable[[str], tuple[LocalGrid, Path]]:
    """Two rounds across sites by any method, once for all tests: the sites, and the server's run folder."""
    folder = tmp_path_factory.mktemp("far")
    return cache(lambda method: (across(folder / method, bases, **changes_of(method))[0], folder / method))


def across(
    out: Path, bases: Bases, if_exists: str = "ask", consent: Consent = AGREED, **changes: Any
) -> tuple[LocalGrid, list[dict[str, Any]]]:
    """A run across sites in this process; its events."""
    values = micro.settings(out, data__clients=3, **changes)
    grid = LocalGrid(out.with_name(f"{out.name}-sites"), range(3), bases, consent=consent)
    seen: list[dict[str, Any]] = []
    serve(grid, parse_config(values, "s").model_dump(mode="json"), if_exists, seen.append)  # type: ignore[arg-type]
    return grid, seen


def on_one_machine(out: Path, **changes: Any) -> Path:
    micro.run_here(micro.settings(out, data__clients=3, federation__executor="loop", **changes))
    return out


def site_runs(grid: LocalGrid) -> list[Path]:
    """The run's folder at every site."""
    return [next(path for path in (grid.folder / str(client)).iterdir() if path.is_dir()) for client in grid.sites]


def site_files(grid: LocalGrid, below: str) -> dict[str, bytes]:
    return {f"{below}/{name}": data for run in site_runs(grid) for name, data in micro.tree(run / below).items()}


def settings_of(run: Path) -> dict[str, Any]:
    """What ``config.yaml`` says, but for where a run is and how it was computed."""
    said: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    del said["out"], said["federation"]["executor"], said["federation"]["cohort"]
    return said


@pytest.mark.parametrize("method", METHODS_HERE)
def test_sites_and_one_machine_end_with_the_same_files(
    method: str, tmp_path: Path, far: Callable[[str], tuple[LocalGrid, Path]]
) -> None:
    grid, run = far(method)
    here = on_one_machine(tmp_path / "here", **changes_of(method))
    one = {name: data for name, data in micro.tree(here).items() if name.startswith(("clients/", "results/"))}
    both = site_files(grid, "clients") | site_files(grid, "results")
    server = {n: d for n, d in micro.tree(run).items() if n.startswith("results/")}
    assert one.keys() == (both | server).keys()
    assert {name: server.get(name, both.get(name)) for name in one} == one
    assert not any("eval_client" in name for name in server), "answers stay at the sites"
    assert settings_of(run) == settings_of(here)


def test_the_server_logs_what_one_machine_logs(tmp_path: Path, bases: Bases) -> None:
    _, seen = across(tmp_path / "far", bases)
    here = on_one_machine(tmp_path / "here")
    far, near = micro.timeless(tmp_path / "far"), micro.timeless(here)
    assert near.pop(1)["event"] == "note", "what was understood of the rows, which the server has not seen"
    assert [e["event"] for e in far] == [e["event"] for e in near]
    ignored = {"run", "source", "row_lora_drift", "bytes_up", "bytes_down"}
    for mine, other in zip(far, near, strict=True):
        assert {k: v for k, v in mine.items() if k not in ignored} == {
            k: v for k, v in other.items() if k not in ignored
        }
    assert [e["event"] for e in seen if e["event"] != "node"] == [e["event"] for e in far]


def test_partial_participation_is_the_same(tmp_path: Path, bases: Bases) -> None:
    changes: dict[str, Any] = {"federation__fraction": 0.7, "federation__rounds": 4, "flower__min_sites": 1}
    changes["flower__allow_two"] = True  # or the two of a round are not told each other's upload
    grid, _ = across(tmp_path / "far", bases, **changes)
    here = on_one_machine(tmp_path / "here", **changes)
    for run, client in zip(site_runs(grid), grid.sites, strict=True):
        assert micro.tree(run / "clients" / str(client)) == micro.tree(here / "clients" / str(client))


@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_a_shorter_wire_carries_less_and_hardly_changes_the_row(wire: str, tmp_path: Path, bases: Bases) -> None:
    exact, _ = across(tmp_path / "fp32", bases)
    short, _ = across(tmp_path / wire, bases, flower__wire=wire)
    one, other = (next(len(reply.block) for _, asked, reply in g.sent if asked.do == "train") for g in (exact, short))
    assert other < 0.75 * one
    assert 0 < micro.farthest(site_runs(exact)[0], site_runs(short)[0]) < 0.2


def test_classifiers_run_across_sites_with_their_labels_named(tmp_path: Path, bases: Bases) -> None:
    changes = CLASSIFIERS | {"federation__rounds": 2}
    grid, _ = across(tmp_path / "far", Bases(), **changes)
    here = on_one_machine(tmp_path / "here", **changes)
    for run, client in zip(site_runs(grid), grid.sites, strict=True):
        assert micro.tree(run / "clients" / str(client)) == micro.tree(here / "clients" / str(client))
    scores = json.loads((tmp_path / "far/results/final_scores.json").read_text())
    assert scores == json.loads((here / "results/final_scores.json").read_text())


UPLOADED: dict[str, set[str]] = {
    **{name: {"global.A", "global.B"} for name in METHODS_HERE},
    **{name: {"individual.A", "individual.B"} for name in ("fedalt", *VARIANTS)},
    **{f"fedalt_{name}": {"individual.A", "individual.B"} for name in ("calibrated", "heldout_mixer", "shared_a")},
    "fedalt_averaged_mixer": {"individual.A", "individual.B", "mixer.G"},
    "fedit_split": {"part0.A", "part0.B", "part1.A", "part1.B", "mixer.G"},
    "fedsa_lora": {"global.A"},
    "ffa_lora": {"global.B"},
    "fed_sb": {"global.R"},
    "local": set(),
    "zero_shot": set(),
}
"""What leaves a site, by slot and factor; all else that a client has is private."""
COPIED = ("feddpa_f", "fdlora")
"""Methods whose private slot is at first a copy of what was uploaded."""


@pytest.mark.parametrize("method", METHODS_HERE)
def test_flowers_messages_hold_what_is_shared_and_nothing_else(
    method: str, far: Callable[[str], tuple[LocalGrid, Path]]
) -> None:
    check_bytes(far(method)[0], UPLOADED[method], copied=method in COPIED)
    rows = [
        row
        for client in range(3)
        for n, at in ((micro.TRAIN, 0), (micro.TEST, 100))
        for row in micro.rows(client, n, at)
    ]
    sent = b"".join(wired(message) for _, *both in far(method)[0].messages for message in both)
    assert not [row["instruction"] for row in rows if row["instruction"].encode() in sent]


@pytest.mark.parametrize("heads", ["private", "shared"])
def test_heads_are_in_flowers_messages_only_if_shared(heads: str, tmp_path: Path) -> None:
    changes = CLASSIFIERS | {"federation__rounds": 1, "federation__heads": heads}
    grid, _ = across(tmp_path / "far", Bases(), consent=Consent(frozenset(("heads",))), **changes)
    check_bytes(grid, {"individual.A", "individual.B"} | ({"head.weight", "head.bias"} if heads == "shared" else set()))


def check_bytes(grid: LocalGrid, shared: set[str], copied: bool = False) -> None:
    """Look for every tensor of every client, after any round, in the bytes that it sent."""
    found = set[str]()
    for run, client in zip(site_runs(grid), grid.sites, strict=True):
        sent = b"".join(wired(answer) for who, _, answer in grid.messages if who == client)
        kept = [load_state(path) for path in sorted(run.glob(f"checkpoints/round_*/clients/{client}.safetensors"))]
        own = [item for state in kept for item in (*state.tensors.items(), *state.heads.items())]
        heads = [(key, value) for state in kept for key, value in state.heads.items() if name(key) in shared]
        uploaded = [*heads, *(item for state in kept for item in (state.sent or {}).items())]
        assert all(raw(value) in sent for _, value in uploaded)
        found |= {name(key) for key, _ in uploaded}
        known = {raw(value) for _, value in uploaded} if copied else set()
        for key, value in own:
            if name(key) not in shared and value.any() and raw(value) not in known:  # zeros are everywhere
                assert raw(value) not in sent, f"client {client}: {key}"
    assert found == shared


def name(key: Key) -> str:
    return f"{key.slot}.{key.factor}"


def test_a_message_has_one_array_at_most_and_its_bytes_are_counted_without_flowers_own(
    far: Callable[[str], tuple[LocalGrid, Path]],
) -> None:
    grid, run = far("fedalt")
    for _, asked, answer in grid.messages:
        for message, tensors in ((asked, request_in(asked).block), (answer, reply_in(answer).block)):
            records = message.content.array_records.values()
            assert [len(record) for record in records] == ([1] if tensors else [])
            assert 0 < len(wired(message)) - size(message) < 2500
    trained = {
        (request_in(asked).round, client): (size(answer), size(asked))
        for client, asked, answer in grid.messages
        if request_in(asked).do == "train"
    }
    events = micro.of_kind(run, "client")
    assert {(e["round"], e["client"]): (e["bytes_up"], e["bytes_down"]) for e in events} == trained
    assert all(up > 3000 for up, _ in trained.values())
