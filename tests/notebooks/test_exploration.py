"""The notebook runs from top to bottom on a finished run, and holds no outputs in the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cells import cells_of, check_stripped, execute, text_of
from micro import CLIENTS, answers, finished, run_here, settings, shared_classifier, shared_data

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "exploration.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook on a run that answers in free text."""
    return execute(NOTEBOOK, tmp_path_factory.mktemp("notebook"), FEDALT_RUN=str(finished()))


def test_every_cell_runs(executed: Any) -> None:
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    for name in ("partition", "losses", "scores", "mixer"):
        (cell,) = [cell for cell in cells if cell.id == name]
        drawn = [output for output in cell.outputs if "application/vnd.plotly.v1+json" in output.get("data", {})]
        assert len(drawn) == 1, name
        assert drawn[0].data["application/vnd.plotly.v1+json"]["data"]


def test_numbers_and_rows_are_the_runs(executed: Any) -> None:
    assert text_of(executed, "history") == f"fedalt on {shared_data()}: {CLIENTS} clients, 3 rounds\n"
    assert text_of(executed, "rows").count("12 train, 0 validation, 4 test") == CLIENTS
    assert text_of(executed, "table").count("rouge1") == CLIENTS


def test_two_clients_answer_the_same_prompt(executed: Any) -> None:
    """The answers are those of ``Chat``, which the first test row of client 0 is put to."""
    from fedalt.data.formats.folder import read_folder
    from fedalt.personal.chat import Chat

    prompt = read_folder(shared_data()).clients[0].test[0].instruction
    said = text_of(executed, "chat")
    assert said.startswith(prompt + "\n")
    for client in (0, CLIENTS - 1):
        assert f"\nclient {client} (task{client}): {Chat(finished(), client).ask(prompt).text}\n" in said
    assert said.count("mean weight of its own LoRA: 0.") == 2


def test_a_run_that_classifies_images(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "model__task": "image_classification",
        "data__clients": 2,
        "data__train_limit": 60,
        "data__test_limit": 4,
        "training__local_epochs": 1,
    }
    folder, _ = run_here(settings(tmp_path / "run", shared_classifier("vit"), Path("digits"), **changes))
    read = execute(NOTEBOOK, tmp_path, FEDALT_RUN=str(folder.path))
    assert not [output for cell in read.cells for output in cell.get("outputs", ()) if output.output_type == "error"]
    assert "accuracy" in text_of(read, "table")
    said = text_of(read, "chat").splitlines()
    (first, *_) = answers(folder.path, 3, [0])
    assert said[0] == first["text"] and f"client 0 (digits): {first['answer']}" in said


def test_without_a_run_it_trains_one(tmp_path: Path) -> None:
    """With a progress bar that is drawn in the notebook, without widgets."""
    read = execute(NOTEBOOK, tmp_path)
    (cell,) = [cell for cell in read.cells if cell.id == "run"]
    (bar,) = [output.data["text/html"] for output in cell.outputs if "text/html" in output.get("data", {})]
    assert "fedalt" in bar and "mean" in bar and "worst" in bar
    assert not [output for output in cell.outputs if output.output_type == "stream"]
    assert "fedalt on tinyworld: 8 clients, 2 rounds" in text_of(read, "history")


def test_it_uses_the_public_names_alone() -> None:
    for path in NOTEBOOK.parent.glob("*.ipynb"):
        code = "\n".join(cell.source for cell in cells_of(path) if cell.cell_type == "code")
        assert "import fedalt as fa" in code
        assert not re.findall(r"(?:from|import) fedalt\.", code), path


def test_outputs_are_stripped() -> None:
    check_stripped(NOTEBOOK)
