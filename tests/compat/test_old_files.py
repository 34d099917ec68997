"""What older code has left behind still opens: run folders, exports, newcomers, comparisons, YAMLs.

``old.tar.xz`` and the files beside it were made by ``make.py`` with the code of commit ad2512f. Since then things have
got other names, which the tables below list; nothing else may differ. The files are opened by the command, or by
functions that anybody may call.
"""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedalt.compat import _LATER
from fedalt.config import load_config, with_settings
from fedalt.methods.registry import configured
from fedalt.runs.folder import settings_of
from micro import call, of_kind, refused

HERE = Path(__file__).parent

RENAMED_SETTINGS: dict[str, str] = {
    "federation.row_participation": "federation.rest_of_world_participation",
    "federation.row_delivery": "federation.rest_of_world_delivery",
    "fedalt.row_aggregator": "fedalt.rest_of_world_aggregator",
    "fedalt.row_rank": "fedalt.rest_of_world_rank",
    "fedalt.row_from": "fedalt.rest_of_world_from",
    "fedalt.row_update": "fedalt.rest_of_world_update",
}
"""Old dotted key → today's."""
RENAMED_VALUES: dict[tuple[str, str], str] = {("fedalt.row_update", "average_rows"): "average"}
"""Old dotted key and its value → today's value."""
RENAMED_SLOTS: dict[str, str] = {"row": "rest_of_world"}
"""Old name of a LoRA, which is also its folder's → today's; a number at the end stays."""
RENAMED_FIELDS: dict[str, str] = {"row_gap": "product_gap", "row_drift": "row_lora_drift"}
"""Old name in events.jsonl → today's."""

RUNS = ("fedalt", "average_rows", "clusters", "stack", "fraction", "heads", "feddpa_t", "fdlora")
"""Finished runs of two rounds; both checkpoints are there."""
INPUTS = ("base", "rows", "labelled", "strangers")
CLIENT = {"newcomers": 3}
"""Who was asked; client 1 elsewhere."""

Take = Callable[..., None]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(HERE / "old.tar.xz") as file:
        file.extractall(folder, filter="data")
    return folder


@pytest.fixture
def take(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Take:
    """Copies some of the old files, and what they were made from, into the working directory."""
    monkeypatch.chdir(tmp_path)

    def copy(*names: str) -> None:
        for name in (*INPUTS, "expected", *names):
            (shutil.copytree if (unpacked / name).is_dir() else shutil.copy)(unpacked / name, name)

    return copy


def machine() -> list[str]:
    """What must be the same for sums to be rounded in the same way."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return [torch.__version__, torch.backends.cpu.get_cpu_capability(), *sorted(names)]


def flat(values: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in nested mappings."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{start}{key}.")
        else:
            yield f"{start}{key}", value


def read_json(path: str | Path) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def done(*arguments: Any) -> Any:
    """A command that succeeds."""
    ended = call(*arguments)
    assert ended.code == 0, ended.err
    return ended


def renamed(path: str) -> str:
    """A path below a client's folder, with the names that its LoRAs have today."""
    parts = [re.fullmatch(r"(.*?)(\d*)", part) for part in path.split("/")]
    return "/".join(RENAMED_SLOTS.get(part[1], part[1]) + part[2] for part in parts if part)


def tensors(folder: str) -> dict[str, Tensor]:
    """Every tensor below a folder, by today's names."""
    files = sorted(Path(folder).rglob("*.safetensors"))
    assert files
    return {
        f"{renamed(path.relative_to(folder).as_posix())}:{name}": value
        for path in files
        for name, value in load_file(path).items()
    }


def same_tensors(found: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
    """Bit for bit on the machine that made the old files; elsewhere sums are rounded in other ways."""
    assert found.keys() == old.keys()
    exact = machine() == read_json("expected/about.json")["machine"]
    far = {
        name: float((found[name] - value).abs().max())
        for name, value in old.items()
        if not (torch.equal(found[name], value) if exact else torch.allclose(found[name], value, atol=1e-3))
    }
    assert not far


def same_scores(found: Mapping[str, Any], old: Mapping[str, Any]) -> None:
    """Everything that the old scores say."""
    parted = {f"points.{i}": point for i, point in enumerate(found.get("points", []))}
    known, exact = dict(flat({**found, **parted})), machine() == read_json("expected/about.json")["machine"]
    for key, value in flat(old):
        near = pytest.approx(value, rel=1e-3) if isinstance(value, float) and not exact else value
        assert known[key] == near, key


def final_scores(run: str) -> Any:
    return read_json(f"{run}/results/final_scores.json")


# ------------------------------------------------------------------------------------------------------- finished runs


@pytest.mark.parametrize("run", RUNS)
def test_an_old_run_is_scored_as_it_was(take: Take, run: str) -> None:
    take(run)
    last = final_scores(run)["last"]["clients"]
    found = done("evaluate", run, "--json").json["clients"]
    assert found.keys() == last.keys()
    same_scores(found, last)


@pytest.mark.parametrize("run", [*RUNS, "comparison/fedalt-seed1", "sweep/lora.r=1/fedalt-seed3"])
def test_an_old_run_has_a_report(take: Take, run: str) -> None:
    """With its scores, and the numbers of the two diagnostics that have got other names."""
    take(run.partition("/")[0])
    done("report", run)
    page = Path(run, "report.html").read_text(encoding="utf-8")
    scores = final_scores(run)
    for values in scores["last"]["clients"].values():
        assert f">{values[scores['metric']]:.1f}<" in page
    found = {event[name] for event in of_kind(Path(run), "round") for name in ("row_gap", "row_drift")} - {None}
    drawn = {number for number in found if repr(number) in page}
    assert drawn == (set() if run in ("feddpa_t", "fdlora") else found)


@pytest.mark.parametrize("run", [*RUNS, "newcomers"])
def test_an_old_client_answers_as_it_did(take: Take, run: str) -> None:
    take(run)
    about = read_json("expected/about.json")
    said = done("generate", run, "--client", CLIENT.get(run, 1), about["question"])
    assert said.out.rstrip("\n") == about["said"][run]


def test_an_old_mixer_looks_where_it_did(take: Take) -> None:
    take("fedalt")
    about = read_json("expected/about.json")
    said = done("generate", "fedalt", "--client", 1, "--show-alpha", about["question"]).out.splitlines()[-1]
    weights = [re.findall(r"0\.\d\d", line) for line in (said, about["shaded"])]
    assert weights[0] == weights[1] and len(weights[0]) == 2


# ------------------------------------------------------------------------------------------------------ runs that go on


@pytest.mark.parametrize("run", RUNS)
def test_an_old_run_does_its_last_round_again(take: Take, run: str) -> None:
    take(run)
    before, scores, log = tensors(f"{run}/clients"), final_scores(run), of_kind(Path(run), "round")
    shutil.rmtree(f"{run}/checkpoints/round_0002")
    shutil.rmtree(f"{run}/clients")
    done("run", "--out", run, "--resume")
    same_tensors(tensors(f"{run}/clients"), before)
    same_scores(final_scores(run), scores)
    again = of_kind(Path(run), "round")
    assert [event["round"] for event in again] == [1, 2]
    for name in ("loss", "row_gap", "row_drift", "bytes_up", "bytes_down"):
        old = log[1][name]
        near = old if old is None else pytest.approx(old, rel=1e-3)
        assert again[1][RENAMED_FIELDS.get(name, name)] == near, name
    done("report", run)  # its log has lines of both


@pytest.mark.parametrize(
    ("run", "arguments"),
    [("fedalt", ("--out", "fedalt", "--resume", "--rounds", 3)), ("stopped", ("stopped.yaml", "--resume"))],
)
def test_an_old_run_goes_on(take: Take, run: str, arguments: tuple[Any, ...]) -> None:
    """One had finished and is given another round; one was killed in its second round."""
    take(run, f"{run}.yaml")
    done("run", *arguments)
    same_tensors(tensors(f"{run}/clients"), tensors(f"expected/{run}/clients"))
    same_scores(final_scores(run), read_json(f"expected/{run}/final_scores.json"))
    assert [event["round"] for event in of_kind(Path(run), "round")] == [1, 2, 3]


@pytest.mark.parametrize("setting", ["fedalt.row_from=all", "federation.row_participation=participants", "lora.r=1"])
def test_an_old_run_with_other_settings_is_another_run(take: Take, setting: str) -> None:
    take("fedalt")
    assert "checkpoint of another run" in refused("run", "--out", "fedalt", "--resume", "--set", setting)


def test_somebody_joins_an_old_run(take: Take) -> None:
    take("fedalt", "newcomers")
    joined = done("onboard", "fedalt", "--data", "strangers", "--epochs", 2, "--out", "again", "--json").json
    same_scores(joined["clients"], read_json("newcomers/results/onboarding.json")["clients"])
    same_tensors(tensors("again/clients"), tensors("newcomers/clients"))


# ------------------------------------------------------------------------------------------------------ tables of runs


@pytest.mark.parametrize(
    ("out", "options"),
    [
        ("comparison", ("--methods", "local,fedalt", "--seeds", "0,1")),
        ("sweep", ("--methods", "fedalt", "--sweep", "lora.r=1,2")),
    ],
)
def test_an_old_table_is_made_again_from_its_runs(take: Take, out: str, options: tuple[str, ...]) -> None:
    take(out, "table.yaml")
    old, file = read_json(f"{out}/{out}.json"), Path(out, f"{out}.json")
    file.unlink()
    made = done("compare", "table.yaml", *options, "--out", out, "--resume", "--json").json
    same_scores(made, scores_alone(old))
    same_scores(read_json(file), scores_alone(old))


def scores_alone(table: Any) -> Any:
    """An old table without its verdicts: they are over clients today, and were over pairs of client and seed."""
    if isinstance(table, dict):
        kept = {key: scores_alone(value) for key, value in table.items() if key not in ("sd", "against")}
        points = kept.pop("points", [])
        return kept | {f"points.{i}": point for i, point in enumerate(points)}
    return [scores_alone(one) for one in table] if isinstance(table, list) else table


# ------------------------------------------------------------------------------------------------------------- exports


def test_an_old_client_is_exported_as_it_was(take: Take) -> None:
    take("fedalt", "export", "static")
    done("export", "fedalt", "--client", 1, "--to", "new")
    same_tensors(tensors("new"), tensors("export"))
    done("export", "fedalt", "--client", 1, "--to", "one", "--static")
    down = {name: value for name, value in tensors("static").items() if "lora_A" in name}  # B has other mean weights
    same_tensors({name: value for name, value in tensors("one").items() if name in down}, down)


def test_an_old_export_takes_a_clients_place(take: Take) -> None:
    take("fedalt", "export")
    shutil.rmtree("fedalt/clients/1")
    assert "no client 1" in refused("generate", "fedalt", "--client", 1, "x")
    Path("export").rename("fedalt/clients/1")
    about = read_json("expected/about.json")
    assert done("generate", "fedalt", "--client", 1, about["question"]).out.rstrip("\n") == about["said"]["fedalt"]


@torch.no_grad()
def test_old_exports_load_with_peft(take: Take) -> None:
    take("export", "static", "newcomers")
    expected = load_file("expected/logits.safetensors")
    ids = expected.pop("ids")
    assert len(expected) == 4
    for folder, logits in expected.items():
        base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
        alone = base(ids).logits[0, -1]
        found = PeftModel.from_pretrained(base, folder).eval()(ids).logits[0, -1]
        assert torch.allclose(found, logits, atol=1e-4), folder
        assert not torch.allclose(found, alone, atol=1e-2), folder


# ---------------------------------------------------------------------------------------------------------------- YAML


def as_today(old: Mapping[str, Any]) -> dict[str, Any]:
    """Old settings, by dotted key, under today's names."""
    return {
        RENAMED_SETTINGS.get(key, key): RENAMED_VALUES.get((key, value), value) if isinstance(value, str) else value
        for key, value in old.items()
    }


def meant(config: Any) -> dict[str, Any]:
    return dict(flat(config.model_dump(mode="json")))


@pytest.mark.parametrize("name", ["every_key", "method_sections"])
def test_old_keys_mean_what_they_meant(name: str) -> None:
    found = meant(load_config(HERE / f"{name}.yaml"))
    for key, value in as_today(read_json(HERE / f"{name}.json")).items():
        assert found[key] == value, key


@pytest.mark.parametrize("chosen", read_json(HERE / "choices.json"), ids=str)
def test_old_values_can_be_chosen(chosen: dict[str, Any]) -> None:
    """With ``--set``, with and without a YAML beneath, and in a sweep."""
    alone = chosen.keys() & {"model.task", "evaluation.metric"}  # not any task goes with any metric
    beneath = HERE / ("method_sections.yaml" if alone else "every_key.yaml")
    for config in (
        load_config(None, list(chosen.items())),
        load_config(beneath, list(chosen.items())),
        with_settings(load_config(beneath), chosen),
    ):
        found = meant(config)
        for key, value in as_today(chosen).items():
            assert found[key] == value, key


def test_the_tables_name_what_there_is() -> None:
    """A name in a table is an old one, and what it stands for is a setting of today."""
    old = read_json(HERE / "every_key.json")
    assert RENAMED_SETTINGS.keys() <= old.keys()
    assert {key for key, _ in RENAMED_VALUES} <= old.keys()
    today = meant(configured(load_config(None), "fedalt"))
    assert today.keys() >= set(RENAMED_SETTINGS.values())
    assert not today.keys() & RENAMED_SETTINGS.keys()


def test_a_run_lacks_only_what_came_after_it(tmp_path: Path) -> None:
    """Settings of a YAML file for a run of any age: what its config.yaml has is as today, the rest as it was then."""
    file = tmp_path / "x.yaml"
    file.write_text("{}")
    today = load_config(None).model_dump(mode="json")
    for section, settings in _LATER.items():
        for key in settings:
            known = json.loads(json.dumps(today))
            del known[section][key]
            (tmp_path / "run").mkdir(exist_ok=True)
            (tmp_path / "run/config.yaml").write_text(json.dumps(known))
            found = settings_of(file, [("out", str(tmp_path / "run"))], "resume").model_dump(mode="json")
            expected = today | {"out": str(tmp_path / "run")}
            expected[section] = {**today[section], key: settings[key]}
            assert found == expected, f"{section}.{key}"
