"""The same settings on one machine and across sites give the same adapters and the same run folder, by any method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import micro
from fedalt.config import parse_config
from fedalt.experiment.members import Bases
from fedalt.flower.consent import Consent
from fedalt.flower.server_app import serve
from fedalt.methods.registry import METHODS
from flower.grid import LocalGrid

METHODS_HERE = [name for name, method in METHODS.items() if not method.pooled]
VARIANTS_HERE = ["fedalt_stack", "fedalt_clusters", "fedalt_row_update", "fedalt_averaged_mixer"]
AGREED = Consent(frozenset(("mixer",)), allow_two=True)
"""FedIT-split averages its routers, an ablation of FedALT its mixers; see test_site.py for what happens without."""
CHANGES: dict[str, dict[str, Any]] = {
    "pf2lora": {"pf2lora__private_lr": 0.02},  # at its default of 2 here a last digit becomes another model
    "hetlora": {"lora__ranks": [2, 4, 4]},
    "zero_pad": {"lora__ranks": [2, 4, 4]},
    "flexlora": {"lora__ranks": [2, 4, 4]},
    "flora": {"lora__ranks": [2, 4, 4]},
}


@pytest.fixture(scope="module")
def bases() -> Bases:
    return Bases()


def across(out: Path, bases: Bases, if_exists: str = "ask", **changes: Any) -> tuple[LocalGrid, list[dict[str, Any]]]:
    """A run across sites in this process; its events."""
    values = micro.settings(out, data__clients=3, **changes)
    grid = LocalGrid(out.with_name(f"{out.name}-sites"), range(3), bases, consent=AGREED)
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


@pytest.mark.parametrize("method", [*METHODS_HERE, *VARIANTS_HERE])
def test_sites_and_one_machine_end_with_the_same_files(method: str, tmp_path: Path, bases: Bases) -> None:
    changes = {"method": method, "federation__rounds": 2, "evaluation__every": 2, **CHANGES.get(method, {})}
    grid, _ = across(tmp_path / "far", bases, **changes)
    here = on_one_machine(tmp_path / "here", **changes)
    one = {name: data for name, data in micro.tree(here).items() if name.startswith(("clients/", "results/"))}
    both = site_files(grid, "clients") | site_files(grid, "results")
    server = {n: d for n, d in micro.tree(tmp_path / "far").items() if n.startswith("results/")}
    assert one.keys() == (both | server).keys()
    assert {name: server.get(name, both.get(name)) for name in one} == one
    assert not any("eval_client" in name for name in server), "answers stay at the sites"


def test_the_server_logs_what_one_machine_logs(tmp_path: Path, bases: Bases) -> None:
    _, seen = across(tmp_path / "far", bases)
    here = on_one_machine(tmp_path / "here")
    far = micro.timeless(tmp_path / "far")
    assert [e["event"] for e in far] == [e["event"] for e in micro.timeless(here)]
    ignored = {"run", "source", "row_drift", "bytes_up", "bytes_down"}
    for mine, other in zip(far, micro.timeless(here), strict=True):
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
    changes: dict[str, Any] = {
        "data__source": str(micro.labelled_data()),
        "model__name": str(micro.shared_classifier()),
        "model__task": "sequence_classification",
        "model__labels": ["large", "middling", "small"],
        "federation__rounds": 2,
    }
    grid, _ = across(tmp_path / "far", Bases(), **changes)
    here = on_one_machine(tmp_path / "here", **changes)
    for run, client in zip(site_runs(grid), grid.sites, strict=True):
        assert micro.tree(run / "clients" / str(client)) == micro.tree(here / "clients" / str(client))
    scores = json.loads((tmp_path / "far/results/final_scores.json").read_text())
    assert scores == json.loads((here / "results/final_scores.json").read_text())
