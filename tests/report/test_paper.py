"""Figures for a paper are those of the report, in files that others open."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from fedalt.report.html import comparison_sections, run_sections
from fedalt.report.paper import write_figures
from fedalt.report.theme import Drawing
from fedalt.runs.folder import open_run
from micro import call, finished, refused, settings, shared_data, shared_model, write_yaml


def test_every_figure_of_a_report_in_every_format(tmp_path: Path) -> None:
    run = finished()
    done = call("figures", run, "--format", "pdf, svg,png", "--out", tmp_path / "f")
    assert done.code == 0, done.err
    shown = {part.id for one in run_sections(open_run(run)[0])[2] for part in one.parts if isinstance(part, Drawing)}
    assert {path.name for path in (tmp_path / "f").iterdir()} == {
        f"{i}.{k}" for i in shown for k in ("pdf", "svg", "png")
    }
    assert {"loss", "score-curves", "alpha"} <= shown
    assert (tmp_path / "f" / "loss.pdf").read_bytes().startswith(b"%PDF")
    assert "<svg" in (tmp_path / "f" / "alpha.svg").read_text(encoding="utf-8")
    with Image.open(tmp_path / "f" / "loss.png") as picture:
        assert picture.width > 900 and len(picture.getcolors(1 << 20) or []) > 20, "there is something in it"


def test_the_same_figures_are_the_same_files(tmp_path: Path) -> None:
    one, other = (write_figures(finished(), ["pdf", "svg"], tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


def test_bars_heat_maps_and_costs_of_a_comparison(tmp_path: Path) -> None:
    values = settings(tmp_path / "all", shared_model(), shared_data(), federation__rounds=1, training__local_epochs=1)
    done = call("compare", write_yaml(tmp_path / "x.yaml", values), "--methods", "local,fedit", "--seeds", "0,1")
    assert done.code == 0, done.err
    written = {path.name for path in write_figures(tmp_path / "all", ["pdf"])}
    known = json.loads((tmp_path / "all" / "comparison.json").read_text())
    parts = [part for one in comparison_sections(tmp_path / "all", known) for part in one.parts]
    assert written == {f"{part.id}.pdf" for part in parts if isinstance(part, Drawing)}
    assert {"bars.pdf", "gain.pdf", "cost-plot.pdf"} <= written


@pytest.mark.parametrize(
    ("run", "options", "said"), [("", ["--format", "gif"], "gif is none of"), ("none", [], "not a run")]
)
def test_what_there_is_none_of(tmp_path: Path, run: str, options: list[str], said: str) -> None:
    assert said in refused("figures", tmp_path / "none" if run else finished(), *options)
