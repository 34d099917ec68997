"""Recipes run in miniature: their own command on a few rows, with a micro model of the family that they ask for."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from fedalt.config import load_config
from fedalt.methods.fedalt_variants import ABLATIONS
from micro import call, labelled_table, shared_classifier, shared_data, shared_model

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "src" / "fedalt" / "recipes"
RECIPES = sorted((SHIPPED / "federated_lora").glob("*sst2*.yaml"))
PAPER = sorted((SHIPPED / "paper").glob("*.yaml"))
FAMILIES = {"bigscience/bloom-560m": "bloom", "meta-llama/Llama-2-7b-hf": "llama"}
SMALLER = {"16,64,256": "2,4", "0,1,2,3,4": "0", "0,1,2": "0", "local_epochs=5,10": "local_epochs=1,2"}
QUICK = ("training.local_epochs=1", "data.train_limit=2", "data.test_limit=1", "evaluation.max_new_tokens=2")


def command(path: Path) -> list[str]:
    """What the first line says, with less of it; without a command there, a run."""
    line = path.read_text(encoding="utf-8").splitlines()[0]
    if not line.startswith("# fedalt "):
        return ["run", str(path)]
    for long, short in SMALLER.items():
        line = line.replace(long, short)
    return shlex.split(line.removeprefix("# fedalt "))


def test_recipes_are_found() -> None:
    names = {path.stem for path in RECIPES}
    assert names == {"bloom_sst2_base", "bloom_sst2_fed", "llama2_sst2_fed", "sst2_minilm", "sst2_rank"}


def test_a_clone_shows_the_recipes_of_the_package() -> None:
    def texts(folder: Path) -> dict[Path, str]:
        return {path.relative_to(folder): path.read_text(encoding="utf-8") for path in folder.rglob("*.yaml")}

    assert texts(ROOT / "recipes") == texts(SHIPPED)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_in_miniature(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(path)
    name, recipe, *rest = command(path)
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


def marks(path: Path) -> tuple[pytest.MarkDecorator, ...]:
    """Eight clients of tinyworld, with every method or at every value, take a minute."""
    return (pytest.mark.slow,) if load_config(path).data.source == "tinyworld" and "--data" not in command(path) else ()


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem, marks=marks(path)) for path in PAPER])
def test_a_recipe_of_the_paper_in_miniature(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those on tinyworld have its eight clients and tiny-base; the others have three and a micro model."""
    monkeypatch.chdir(tmp_path)
    config = load_config(path)
    name, recipe, *rest = command(path)
    flags = ["--rounds", "1", "--json", *(part for setting in QUICK for part in ("--set", setting))]
    if config.data.source != "tinyworld" or "--data" in rest:
        flags += ["--model", shared_model(FAMILIES.get(config.model.name, "llama")), "--data", shared_data()]
        flags += ["--clients", "3", "--set", "model.load_in=null", "--set", "model.dtype=float32"]
    done = call(name, ROOT / recipe, *rest, *flags)
    assert done.code == 0, done.err
    (out,) = (tmp_path / "runs").iterdir()
    assert (out / "report.html").is_file()
    if "--sweep" in rest or "--heterogeneity" in rest:
        assert len(done.json["points"]) > 1
    elif name == "compare":
        assert list(done.json["methods"]) == (list(ABLATIONS) if "--ablations" in rest else methods_in(rest))


def methods_in(arguments: list[str]) -> list[str]:
    """Names after ``--methods``."""
    return arguments[arguments.index("--methods") + 1].split(",")


def test_table_1_has_every_method_that_the_paper_compares() -> None:
    for path in PAPER:
        if path.stem.startswith("table1"):
            assert set(TABLE_1) <= set(methods_in(command(path)))


TABLE_1 = (
    "local", "fedit", "fedit_split", "ffa_lora", "fedsa_lora", "feddpa_f", "feddpa_t", "pf2lora", "fdlora", "fedalt",
)  # fmt: skip
