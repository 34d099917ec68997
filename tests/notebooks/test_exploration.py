"""The notebook runs from top to bottom on a finished run, and holds no outputs in the repository."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from micro import CLIENTS, answers, finished, run_here, settings, shared_classifier, shared_data

nbformat = pytest.importorskip("nbformat")
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "exploration.ipynb"


def execute(run: Path, folder: Path) -> Any:
    """The cells with their outputs on a run, from a kernel of this very interpreter."""
    pytest.importorskip("ipykernel")
    client = pytest.importorskip("nbclient")
    jupyter = pytest.importorskip("jupyter_client")
    paths = os.pathsep.join(path for path in sys.path if path)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    manager = jupyter.AsyncKernelManager(kernel_name="python3")
    manager.kernel_spec.argv[0] = sys.executable
    executor = client.NotebookClient(notebook, km=manager, timeout=60, resources={"metadata": {"path": str(folder)}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDALT_RUN", str(run))
        patch.setenv("PYTHONPATH", paths)
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        return executor.execute(cleanup_kc=True)  # a kernel manager of ours is not shut down otherwise


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook on a run that answers in free text."""
    return execute(finished(), tmp_path_factory.mktemp("notebook"))


def text_of(notebook: Any, cell: str) -> str:
    (found,) = [c for c in notebook.cells if c.id == cell]
    return "".join(
        output.text for output in found.outputs if output.output_type == "stream" and output.name == "stdout"
    )


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
    read = execute(folder.path, tmp_path)
    assert not [output for cell in read.cells for output in cell.get("outputs", ()) if output.output_type == "error"]
    assert "accuracy" in text_of(read, "table")
    said = text_of(read, "chat").splitlines()
    (first, *_) = answers(folder.path, 3, [0])
    assert said[0] == first["text"] and f"client 0 (digits): {first['answer']}" in said


def test_outputs_are_stripped() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
