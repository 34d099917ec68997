"""The notebook that writes a method runs from top to bottom, and its table is the one of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cells import check_stripped, execute, text_of

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "own_method.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return execute(NOTEBOOK, tmp_path_factory.mktemp("own_method"))


def test_every_cell_runs(executed: Any) -> None:
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    (fedit, weak, strong) = (list(map(float, line.split())) for line in text_of(executed, "simulation").splitlines())
    assert all(s < w < f for f, w, s in zip(fedit, weak, strong, strict=True))
    (table,) = [cell for cell in cells if cell.id == "table"]
    (shown,) = [out.data["text/markdown"] for out in table.outputs if "text/markdown" in out.get("data", {})]
    latex = text_of(executed, "latex")
    for title in ("Local", "FedIT", "held back (mu=1.0)", "FedALT"):
        assert title in shown and title in latex
    assert latex.count(r"\textbf{") >= 5 and r"$\pm$" in latex


def test_outputs_are_stripped() -> None:
    check_stripped(NOTEBOOK)
