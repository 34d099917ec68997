"""Sources and prompt templates from a file outside the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedalt.registry import SOURCES
from fedalt.runs.client_folder import CONFIG
from micro import call, refused, settings, write_yaml

pytestmark = pytest.mark.usefixtures("forgotten")

FILE = """
from fedalt.registry import SOURCES, TEMPLATES
from fedalt.config.section import Section


def row(i):
    return {"instruction": f"Say {i}.", "output": str(i % 3)}


def reviews():
    rows = [row(i) for i in range(30)]
    return {"anna": (rows[:10], rows[10:12]), "ben": (rows[12:24], rows[24:])}


def sums():
    return [row(i) for i in range(60)]


@SOURCES.register("many")
class Many:
    class Settings(Section):
        rows: int = 40

    def __call__(self):
        return {"train": [row(i) for i in range(self.settings.rows)], "test": [row(i) for i in range(9)]}


def nothing():
    return 3


def broken():
    raise KeyError("label")


mine = "Q: {instruction} A: "
no_place = "Q: A: "


@TEMPLATES.register("loud")
class Loud:
    class Settings(Section):
        times: int = 1

    def __call__(self, instruction):
        return instruction.upper() + self.settings.times * "!"


def number(instruction):
    return 3
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def shown(*line: Any) -> dict[str, Any]:
    done = call("partition", *line, "--json")
    assert done.code == 0, done.err
    found: dict[str, Any] = done.json
    return found


def sizes(found: dict[str, Any], split: str = "train") -> list[int]:
    return [sum(counts[split].values()) for counts in found["counts"].values()]


def test_a_function_that_returns_clients(file: Path) -> None:
    found = shown("--data", f"{file}:reviews")
    assert (sizes(found), sizes(found, "test")) == ([10, 12], [2, 6])
    assert found["source"] == "reviews"
    assert sizes(shown("--data", "mine.py:reviews", "--clients", 1)) == [10]


def test_a_function_that_returns_rows(file: Path) -> None:
    found = shown("--data", "mine.py:sums", "--clients", 3, "--set", "data.partition.by=dirichlet")
    assert sum(sizes(found)) + sum(sizes(found, "test")) == 60


def test_a_class_with_settings(file: Path) -> None:
    options = ("--clients", 2, "--set", "data.partition.by=iid")
    assert sizes(shown("--data", f"{file}:Many", *options)) == [20, 20]
    given = ("--set", f"plugins=[{file}]", "--set", "many.rows=30")
    assert sizes(shown("--data", "many", *given, *options)) == [15, 15]
    assert '"many.rwos"' in refused("partition", "--data", "many", *given, "--set", "many.rwos=3")


def test_a_module_by_its_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / "shop_of_tests.py").write_text(FILE)
    monkeypatch.syspath_prepend(str(file.parent))
    assert sizes(shown("--data", "shop_of_tests:reviews")) == [10, 12]
    assert "is no folder" in refused("partition", "--data", "shop_of_tests:no_such_thing")


def test_a_registered_source_goes_before_a_path_of_its_name_and_says_so(file: Path) -> None:
    (file.parent / "reviews").mkdir()
    found = shown("--data", "mine.py:reviews")
    assert sizes(found) == [10, 12]
    assert (
        f"data.source: reviews is the source of file {file}; for the path of this name write ./reviews"
        in found["notes"]
    )
    assert "no training rows" in refused("partition", "--data", "./reviews")


@pytest.mark.parametrize("text", ["C:\\\\rows\\\\x", "glue:sst2", "json:none", "rows.csv:x"])
def test_what_is_no_reference(file: Path, text: str) -> None:
    assert SOURCES.reference(text) is None


def test_a_folder_with_a_colon_is_a_folder(file: Path) -> None:
    (file.parent / "json:loads").mkdir()
    assert SOURCES.reference("json:loads") is None
    assert SOURCES.reference("json:dumps") == ("json", "dumps")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("reveiws", 'source: {file} has no "reveiws" (did you mean "reviews"?)'),
        ("nothing", 'source "nothing" of file {file}: '),
        ("broken", "source \"broken\" of file {file}:33: KeyError: 'label'"),
    ],
)
def test_what_a_source_may_not_do(file: Path, name: str, line: str) -> None:
    assert line.format(file=file) in refused("partition", "--data", f"{file}:{name}")


def test_a_run_scores_and_welcomes_rows_of_a_source(file: Path) -> None:
    values = settings(file.parent / "run", federation__rounds=1)
    config = write_yaml(file.parent / "x.yaml", values)
    done = call("run", config, "--data", "mine.py:reviews", "--set", f"data.template={file}:mine", "--json")
    assert done.code == 0, done.err
    again = call("evaluate", "run", "--json")
    assert again.json["clients"]["0"]["rouge1"] == done.json["last"]["clients"]["0"]["rouge1"]
    other = call("evaluate", "run", "--data", "mine.py:sums", "--json")
    assert other.code == 0 and other.json["clients"]["1"]["rows"] == 60
    joined = call("onboard", "run", "--data", "mine.py:reviews", "--epochs", 0, "--json")
    assert joined.code == 0 and len(joined.json["clients"]) == 2, joined.err


# ----------------------------------------------------------------------------------------------------------- templates


def test_templates_that_are_a_text_and_a_class_with_settings(file: Path) -> None:
    """The text is kept with the model, for people without fedalt; both are part of what the run is."""
    config = write_yaml(file.parent / "x.yaml", settings(file.parent / "run", federation__rounds=1))
    assert call("run", config, "--set", f"data.template={file}:mine").code == 0
    about = json.loads((file.parent / "run" / "clients" / "0" / CONFIG).read_text())
    assert (about["template"], about["prompt"]) == ("mine", "Q: {instruction} A: ")
    start = json.loads((file.parent / "run" / "events.jsonl").read_text().splitlines()[0])
    assert list(start["code"]) == ["template mine"]
    scores = []
    for times in (1, 2):
        out = ("--out", f"loud{times}", "--set", f"plugins=[{file}]", "--set", f"loud.times={times}")
        done = call("run", config, *out, "--set", "data.template=loud", "--json")
        assert done.code == 0, done.err
        events = [json.loads(line) for line in (file.parent / f"loud{times}" / "events.jsonl").read_text().splitlines()]
        scores.append([event["tokens"] for event in events if event["event"] == "client"])
    assert scores[0] != scores[1]


@pytest.mark.parametrize(
    ("template", "line"),
    [
        ("{file}:mien", 'template: {file} has no "mien" (did you mean "mine"?)'),
        ("{file}:no_place", "data.template: no_place does not hold {{instruction}}"),
        ("{file}:number", 'template "number" returned int; a prompt is text'),
        ("alpaca_shrt", '"alpaca_shrt" is no template (did you mean "alpaca_short"?)'),
    ],
)
def test_what_a_template_may_not_be(file: Path, template: str, line: str) -> None:
    config = write_yaml(file.parent / "x.yaml", settings(file.parent / "run"))
    assert line.format(file=file) in refused("run", config, "--set", f"data.template={template.format(file=file)}")
