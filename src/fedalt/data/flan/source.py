"""Opens a task's data set: the hub's, a cached one, or a local copy."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedalt.data.flan.tasks import Task
from fedalt.errors import UserError, did_you_mean

_SAVED = ("dataset_dict.json", "dataset_info.json")
"""What ``save_to_disk`` leaves in a folder."""

Splits = Mapping[str, Any]
"""Name of a split → ``datasets.Dataset``."""


def check_installed() -> None:
    """Refuse to begin without the library that reads data sets."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError("prepare flan needs datasets; install it with: pip install 'fedalt[datasets]'")


def open_splits(task: Task, local: Path | None) -> Splits:
    """All splits of a task that have the columns it needs under the names it knows.

    Args:
        task: The task.
        local: Folder with a copy of every data set under its task's name; the hub and its cache when not given.

    Raises:
        UserError: The data set is not there or cannot be read, or has other columns.
    """
    place = task.hub if local is None else local / task.name
    if isinstance(place, Path) and not place.is_dir():
        raise UserError(f"{place} is no folder; --from looks for a copy of every data set under its task's name")
    try:
        opened = _saved(place) if isinstance(place, Path) else _from_hub(task)
    except Exception as error:  # whatever the hub, the network or a file gives rise to
        help_ = "" if local else f"; a local copy in DIR/{task.name} can be given with --from DIR"
        raise UserError(f"{place} cannot be opened ({_first(error)}){help_}") from None
    splits = dict(opened) if isinstance(opened, dict) else {task.train[0]: opened}
    return {name: _named(task, split, f"{place}, split {name}") for name, split in splits.items()}


def _from_hub(task: Task) -> Any:
    from datasets import load_dataset

    return load_dataset(task.hub, task.config, revision=task.revision)


def _saved(path: Path) -> Any:
    from datasets import load_dataset, load_from_disk

    return load_from_disk(path) if any((path / name).is_file() for name in _SAVED) else load_dataset(str(path))


def _named(task: Task, split: Any, where: str) -> Any:
    split = split.rename_columns({old: new for old, new in task.aliases.items() if old in split.column_names})
    missing = next((name for name in task.columns if name not in split.column_names), None)
    if missing is not None:
        have = ", ".join(split.column_names) or "none"
        raise UserError(f'{where}: no column "{missing}"{did_you_mean(missing, split.column_names)}; it has: {have}')
    return split


def _first(error: Exception) -> str:
    """The first line of what a library says, or what it calls it."""
    return (str(error).strip() or type(error).__name__).split("\n", maxsplit=1)[0].rstrip(".")
