"""Recipes that classify SST-2 run in miniature: their own command, a micro model of the same family, a few rows."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from fedalt.config import load_config
from micro import call, labelled_table, shared_classifier, shared_model

RECIPES = sorted((Path(__file__).parents[1] / "recipes" / "federated_lora").glob("*sst2*.yaml"))
FAMILIES = {"bigscience/bloom-560m": "bloom", "meta-llama/Llama-2-7b-hf": "llama"}
SMALLER = {"16,64,256": "2,4", "0,1,2": "0"}


def test_recipes_are_found() -> None:
    names = {path.stem for path in RECIPES}
    assert names == {"bloom_sst2_base", "bloom_sst2_fed", "llama2_sst2_fed", "sst2_minilm", "sst2_rank"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_in_miniature(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(path)
    line = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# fedalt ")
    for long, short in SMALLER.items():
        line = line.replace(long, short)
    name, recipe, *rest = shlex.split(line)
    family = FAMILIES.get(config.model.name)
    model = shared_model(family) if family else shared_classifier()
    flags = ["--model", model, "--data", labelled_table(header=config.data.columns is None), "--rounds", "1"]
    flags += ["--clients", "2", "--json"]
    for setting in ("model.load_in=null", "model.dtype=float32", "data.train_limit=4", "data.test_limit=4"):
        flags += ["--set", setting]
    done = call(name, path.parents[2] / recipe, *rest, *flags)
    assert done.code == 0, done.err
    if name == "compare":
        (out,) = (tmp_path / "runs").iterdir()
        assert (out / "report.html").is_file()
        assert done.json["metric"] == "accuracy"
        assert ("points" in done.json) == ("--sweep" in rest)
        return
    about = json.loads((next((tmp_path / "runs").iterdir()) / "results" / "final_scores.json").read_text())
    assert about["metric"] == "accuracy"
    assert set(about["last"]["clients"]) == {"0", "1"}


def test_a_baseline_differs_from_its_federation_in_the_method_alone() -> None:
    federated, base = (load_config(RECIPES[0].parent / f"bloom_sst2_{name}.yaml") for name in ("fed", "base"))
    assert (federated.method, base.method) == ("fedit", "centralized")
    assert base == federated.model_copy(update={"method": "centralized"})
