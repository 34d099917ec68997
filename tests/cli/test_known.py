"""Version, environment, methods, metrics, recipes: what the package says about itself."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from fedalt.cli import recipes
from fedalt.cli.known import PACKAGES, bf16_units, method_table
from fedalt.config import load_config
from fedalt.errors import UserError
from fedalt.evaluation.metrics import metric_of
from fedalt.registry import METHODS, METRICS
from micro import call, refused


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes are found from anywhere; nothing lands in the checkout."""
    monkeypatch.chdir(tmp_path)


def words(text: str) -> str:
    return " ".join(text.split())


# ------------------------------------------------------------------------------------------------ version, environment


def test_the_version() -> None:
    assert call("--version").out == f"fedalt {version('fedalt')}\n"


def test_the_environment_as_json_and_as_lines() -> None:
    found = call("env", "--json").json
    assert found["fedalt"] == version("fedalt")
    assert found["versions"]["torch"] == version("torch")
    assert set(found["versions"]) == set(PACKAGES)
    assert found["cores"] >= 1
    assert found["memory"] > 1e9
    lines = dict(line.split(maxsplit=1) for line in call("env").out.splitlines())
    assert lines["torch"] == version("torch")
    assert lines["python"].endswith(found["python"])
    assert lines["memory"] == f"{found['memory'] / 1e9:.1f} GB"


def test_the_environment_holds_no_paths() -> None:
    text = call("env", "--json").out + call("env").out
    assert str(Path.home()) not in text
    assert not [word for word in text.replace('"', " ").split() if word.startswith("/")]


@pytest.mark.parametrize(
    ("line", "units"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_bf16", ["amx_bf16", "avx512_bf16"]),
        ("Features\t: fp asimd bf16", ["bf16"]),
        ("flags\t\t: fpu avx2", []),
        ("model name\t: bf16 and more", []),
    ],
)
def test_units_for_bf16_are_read_from_linux(tmp_path: Path, line: str, units: list[str]) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert bf16_units(tmp_path / "cpuinfo") == units
    assert bf16_units(tmp_path / "nowhere") is None


# ------------------------------------------------------------------------------------------------------------- methods


def test_every_method_is_in_the_table_and_in_the_json() -> None:
    table, found = words(call("methods").out), call("methods", "--json").json
    assert [one["name"] for one in found] == list(METHODS.names())
    for one in found:
        assert one["name"] in table
        assert one["title"]
        assert one["source"]
        assert one["what it is"]


@pytest.mark.parametrize(
    ("name", "sends"),
    [
        ("local", "nothing"),
        ("zero_shot", "nothing"),
        ("centralized", "its rows"),
        ("fedit", "A, B"),
        ("ffa_lora", "B"),
        ("fed_sb", "R"),
        ("fedsa_lora", "A"),
        ("fedalt", "A, B"),
        ("fedalt_averaged_mixer", "A, B, mixer"),
    ],
)
def test_what_a_method_sends(name: str, sends: str) -> None:
    assert method_table()[name]["sends"] == sends
    assert f"sends: {sends}\n" in call("methods", name).out


@pytest.mark.parametrize("name", METHODS.names())
def test_a_method_shows_its_text_and_its_settings(name: str) -> None:
    facts, out = method_table()[name], call("methods", name).out
    assert facts["text"].splitlines()[0].replace("``", "").split()[0] in out
    for setting in facts["settings"]:
        assert f"{setting['key']} = {setting['default']}\n" in out
        assert words(setting["what it may be"]) in words(out)
        assert words(setting["what it does"]) in words(out)


def test_settings_are_given_with_kind_range_and_default() -> None:
    facts = {one["key"]: one for one in method_table()["fedalt"]["settings"]}
    assert facts["fedalt.trim"]["what it may be"] == "number, at least 0, less than 0.5"
    assert facts["fedalt.trim"]["default"] == "0.2"
    assert facts["fedalt.rest_of_world_from"]["what it may be"] == "others or all"
    assert "krum" in facts["fedalt.rest_of_world_aggregator"]["what it may be"]
    assert facts["fedalt.rest_of_world_rank"] | {"what it does": ""} == {
        "key": "fedalt.rest_of_world_rank",
        "what it may be": "whole number, at least 1",
        "default": "null",
        "what it does": "",
    }


def test_a_variant_says_what_it_changes() -> None:
    assert "FedALT with fedalt.rest_of_world_aggregator=svd" in call("methods", "fedalt_svd").out


def test_a_method_of_ones_own_is_shown_like_ours(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from pydantic import Field\n"
        "from fedalt.methods.base import Method\n"
        "from fedalt.config.section import Section\n"
        "class ShownHere(Method):\n"
        '    """FedIT with a name of its own. It is here for a test."""\n'
        "    class Settings(Section):\n"
        '        weight: float = Field(0.5, ge=0, description="how much of it")\n'
    )
    out = call("methods", "mine.py:ShownHere").out
    for piece in ("(shown_here)", f"source: file {tmp_path / 'mine.py'}", "shown_here.weight = 0.5", "at least 0"):
        assert piece in out


@pytest.mark.parametrize("command", ["methods", "metrics"])
def test_a_name_that_is_none(command: str) -> None:
    wrong, right = {"methods": ("fedallt", "fedalt"), "metrics": ("rouge3", "rouge")}[command]
    assert f'"{wrong}" is unknown (did you mean "{right}' in refused(command, wrong)


def test_every_metric_is_explained() -> None:
    found = {one["name"]: one for one in call("metrics", "--json").json}
    assert tuple(found) == METRICS.names()
    table = words(call("metrics").out)
    for name in METRICS:
        title = metric_of(name).title
        assert found[name]["title"] == title
        assert f"{title}; " in table
        assert words(found[name]["text"]).replace("``", "") in words(call("metrics", name).out)


@pytest.mark.parametrize("line", [["methods"], ["metrics"], ["recipes"], ["methods", "fedalt"]], ids=" ".join)
def test_nothing_is_cut_in_tables(line: list[str]) -> None:
    assert "…" not in call(*line).out


# ------------------------------------------------------------------------------------------------------------- recipes


def test_recipes_are_listed_with_what_they_are() -> None:
    found = json.loads(call("recipes", "--json").out)
    assert {"demo", "paper/figure4_rank", "vision/digits"} <= found.keys()
    assert found["paper/figure4_rank"] == "Figure 4: ranks"
    assert all(found.values())
    table = words(call("recipes").out)
    assert all(name in table for name in found)


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "recipes/demo.yaml", "./recipes/demo.yaml"])
def test_a_recipe_is_found_by_any_of_its_names(name: str) -> None:
    path = recipes.config_path(Path(name))
    assert path.name == "demo.yaml"
    assert load_config(path).data.source == "tinyworld"
    assert call("partition", name, "--clients", 8, "--json").code == 0


@pytest.mark.parametrize("name", ["figure4_rank", "paper/figure4_rank", "recipes/paper/figure4_rank.yaml"])
def test_a_recipe_in_a_folder_needs_no_folder(name: str) -> None:
    assert recipes.config_path(Path(name)).as_posix().endswith("paper/figure4_rank.yaml")


@pytest.mark.parametrize("name", ["demo", "recipes/demo.yaml"])
def test_a_file_wins_over_a_recipe(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("lora: {r: 0}\n")
    assert refused("run", name) == f"{name}: lora.r = 0: must be at least 1"


def test_a_folder_does_not_win(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    assert recipes.config_path(Path("demo")).is_file()


def test_two_recipes_of_one_name_need_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/same.yaml", "b/same.yaml"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("# One of two. More.\nseed: 1\n")
    monkeypatch.setattr(recipes, "folder", lambda: tmp_path)
    assert recipes.find("same") is None
    assert recipes.find("b/same") == tmp_path / "b" / "same.yaml"
    assert recipes.summary(tmp_path / "a" / "same.yaml") == "One of two"


@pytest.mark.parametrize("name", ["demoo", "recipes/demo.yml", "figure4_ranks.yaml"])
def test_a_typo_gets_a_suggestion(name: str) -> None:
    with pytest.raises(UserError, match=r"or recipe \(did you mean \"(demo|figure4_rank)\"\?"):
        recipes.config_path(Path(name))


def test_a_recipe_is_printed_and_written(tmp_path: Path) -> None:
    text = recipes.packaged()["demo"].read_text(encoding="utf-8")
    assert call("recipes", "demo").out == text
    assert call("recipes", "demo", "--to", "a/mine.yaml").out == "wrote a/mine.yaml\n"
    assert (tmp_path / "a" / "mine.yaml").read_text(encoding="utf-8") == text
    assert refused("recipes", "demo", "--out", "a/mine.yaml") == "a/mine.yaml: exists already; choose another --out"
    assert refused("recipes", "--out", "x.yaml").startswith("--out: name the recipe to write")
    assert refused("recipes", "dmo").startswith('recipe "dmo" is unknown (did you mean "demo"?)')
