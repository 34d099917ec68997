"""Notebooks as tests see them: executed in a kernel of this very interpreter, or as they are in the repository."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")


def execute(path: Path, folder: Path, **environment: str) -> Any:
    """The cells with their outputs, from a kernel of this very interpreter."""
    pytest.importorskip("ipykernel")
    client = pytest.importorskip("nbclient")
    jupyter = pytest.importorskip("jupyter_client")
    paths = os.pathsep.join(path for path in sys.path if path)
    notebook = nbformat.read(path, as_version=4)
    manager = jupyter.AsyncKernelManager(kernel_name="python3")
    manager.kernel_spec.argv[0] = sys.executable
    executor = client.NotebookClient(notebook, km=manager, timeout=600, resources={"metadata": {"path": str(folder)}})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", paths)
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        return executor.execute(cleanup_kc=True)  # a kernel manager of ours is not shut down otherwise


def text_of(notebook: Any, cell: str) -> str:
    (found,) = [c for c in notebook.cells if c.id == cell]
    return "".join(
        output.text for output in found.outputs if output.output_type == "stream" and output.name == "stdout"
    )


def cells_of(path: Path) -> list[Any]:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells: list[Any] = notebook.cells
    return cells


def check_stripped(path: Path) -> None:
    """A notebook in the repository holds no outputs."""
    code = [cell for cell in cells_of(path) if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
