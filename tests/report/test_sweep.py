"""A sweep's report.html: its table, score by value, score against bytes, and the way to every point."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedalt.comparisons.sweep import grids, sweep_grid
from fedalt.comparisons.tables import markdown
from fedalt.report.sweep import megabytes, write_sweep_report
from micro import CLIENTS, call, settings, write_yaml
from report.test_html import Page, loads_nothing, page

METHODS = ["Local", "FFA-LoRA", "FedALT"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    quick = {"federation__rounds": 1, "training__local_epochs": 1, "data__validation_rows": 2}
    config = write_yaml(folder / "x.yaml", settings(folder / "all", **quick))
    done = call("compare", config, "--methods", "local,ffa_lora,fedalt", "--sweep", "lora.r=2,4")
    assert done.code == 0, done.err
    return folder / "all"


def known(swept: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((swept / "sweep.json").read_text())
    return result


def made(out: Path, result: dict[str, Any]) -> Page:
    html = page(write_sweep_report(out, result))
    loads_nothing(html)
    return html


def test_the_table_is_that_of_the_markdown(swept: Path, tmp_path: Path) -> None:
    result = known(swept)
    for point, (low, high) in zip(result["points"], ((10.0, 20.0), (40.0, 30.0)), strict=True):
        for block, score in zip(point["methods"].values(), (low, high, 5.0), strict=True):
            block |= {"mean": score, "ci95": 1.25, "against": None}
    result["below"] = ["fedalt"]
    out = write_sweep_report(tmp_path, result)
    (table,) = re.findall(r"<table>.*?</table>", out.read_text(encoding="utf-8").split('<section id="scores">')[1])[:1]
    rows = [re.findall(r"<t([hd])( class=\"\w+\")?>(.*?)</t[hd]>", line) for line in table.split("<tr")[1:]]
    assert [[text for _, _, text in row] for row in rows] == [
        ["method \\ lora.r", "2", "4"],
        ["Local", "10.0 ± 1.2", "40.0 ± 1.2"],
        ["FFA-LoRA", "20.0 ± 1.2", "30.0 ± 1.2"],
        ["for reference", "", ""],
        ["FedALT", "5.0 ± 1.2", "5.0 ± 1.2"],
    ]
    best = [text for row in rows for _, kind, text in row if kind == ' class="best"']
    assert best == ["40.0 ± 1.2", "20.0 ± 1.2"], "in the order of rows"
    assert sorted(re.findall(r"\*\*(.*?)\*\*", markdown(sweep_grid(result)))) == sorted(best)


def test_values_are_chosen_on_validation_rows(swept: Path, tmp_path: Path) -> None:
    result = known(swept)
    for point in result["points"]:
        for name, block in point["methods"].items():
            run = next((swept / point["name"]).glob(f"{name}-seed*/results"))
            scores = [json.loads(path.read_text())["validation"]["rouge1"] for path in run.glob("scores_*_round1.json")]
            assert len(scores) == point["clients"]
            assert block["validation"] == pytest.approx(sum(scores) / len(scores))
    for name, low, high in (("local", 10.0, 40.0), ("ffa_lora", 20.0, 15.0), ("fedalt", 5.0, 5.0)):
        for point, score in zip(result["points"], (low, high), strict=True):
            point["methods"][name]["validation"] = score
    _, chosen = grids(result)
    rows = [["Local", "10.0", "40.0 ←"], ["FFA-LoRA", "20.0 ←", "15.0"], ["FedALT", "5.0 ←", "5.0 ←"]]
    assert [list(row) for row in chosen.rows] == rows
    assert "40.0 ←" in write_sweep_report(tmp_path, result).read_text(encoding="utf-8")
    result["points"][1]["methods"]["local"]["validation"] = None  # a client without such rows
    assert grids(result) == [sweep_grid(result)]


def test_score_by_value_with_intervals(swept: Path, tmp_path: Path) -> None:
    result = known(swept)
    traces = made(tmp_path, result).figures["by-value"]
    assert [trace["name"] for trace in traces] == METHODS
    for name, trace in zip(("local", "ffa_lora", "fedalt"), traces, strict=True):
        assert [round(x) for x in trace["x"]] == [0, 1]
        assert trace["text"] == ["2", "4"]
        assert trace["y"] == [point["methods"][name]["mean"] for point in result["points"]]
        assert "error_y" not in trace, "one seed"
    assert len({x for trace in traces for x in trace["x"]}) == 6, "beside each other"
    for point in result["points"]:
        point["methods"]["fedalt"]["ci95"] = 0.5
    traces = made(tmp_path, result).figures["by-value"]
    assert [trace["error_y"]["array"] for trace in traces if "error_y" in trace] == [[0.5, 0.5]]


def test_score_against_bytes_has_a_labelled_point_per_value(swept: Path) -> None:
    result, html = known(swept), page(swept / "report.html")
    traces = {trace["name"]: trace for trace in html.figures["by-bytes"]}
    assert list(traces) == METHODS
    sent = {}
    for name in ("ffa_lora", "fedalt"):
        blocks = [point["methods"][name] for point in result["points"]]
        sent[name] = [block["bytes_up"] / CLIENTS / 1e6 for block in blocks]
        trace = traces[blocks[0]["title"]]
        assert trace["x"] == pytest.approx(sent[name])
        assert trace["y"] == [block["mean"] for block in blocks]
        assert (trace["text"], trace["mode"]) == (["2", "4"], "lines+markers+text")
    assert sent["fedalt"][1] == pytest.approx(2 * sent["fedalt"][0]), "twice the rank, twice the bytes"
    assert sent["ffa_lora"][0] < sent["fedalt"][0]
    assert set(traces["Local"]["x"]) == {min(sent["ffa_lora"]) / 2}, "sends nothing: at the left end of a log axis"
    assert traces["Local"]["customdata"] == ["0", "0"]
    assert '"ticktext":["0",' in html.scripts[-2]
    text = re.sub(r"\s+", " ", " ".join(html.text))
    assert "MB sent per client" in text
    for value, r in zip(sent["fedalt"], ("2", "4"), strict=True):
        assert f"{megabytes(value)}" in text and f"lora.r={r}" in text


def test_every_point_is_linked(swept: Path) -> None:
    tags = page(swept / "report.html").tags
    links = [attributes["href"] or "" for tag, attributes in tags if tag == "a"]
    links = [link for link in links if not link.startswith("#")]
    assert links == ["lora.r=2/report.html", "lora.r=4/report.html"]
    assert all((swept / link).is_file() for link in links)


def test_two_keys_have_no_single_axis_of_values(swept: Path, tmp_path: Path) -> None:
    result = known(swept)
    result["keys"].append("model.name")
    for point, value in zip(result["points"], ("<b>x", "y"), strict=True):
        point["settings"]["model.name"] = value
    html = made(tmp_path, result)
    assert list(html.figures) == ["by-bytes"]
    trace = html.figures["by-bytes"][-1]
    assert (trace["text"], trace["mode"]) == (["2, <b>x", "4, y"], "markers+text")
    assert "lora.r, model.name" in " ".join(html.text)
    assert not any(tag == "b" for tag, _ in html.tags)


def test_nothing_sent_is_no_picture(swept: Path, tmp_path: Path) -> None:
    result = copy.deepcopy(known(swept))
    for point in result["points"]:
        point["methods"] = {"local": point["methods"]["local"]}
    result["reference"] = "local"
    assert list(made(tmp_path, result).figures) == ["by-value"]


def test_a_budget_is_told(swept: Path, tmp_path: Path) -> None:
    text = " ".join(made(tmp_path, known(swept) | {"budget": "bytes"}).text)
    assert "ranks are chosen for equal bytes" in text
    assert "settings other than lora.r" not in text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.00123456, "0.00123"), (2.5, "2.5"), (99.94, "99.9"), (1234.5, "1,234")]
)
def test_megabytes(value: float, text: str) -> None:
    assert megabytes(value) == text
