"""Hugging Face data sets: by name from the hub, from ``save_to_disk``, or from a folder that ``load_dataset`` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedalt.config.data import DataConfig
from fedalt.data.federation import Pool
from fedalt.data.formats.columns import Record, find_label, has_header, to_pool
from fedalt.data.formats.files import NAMES
from fedalt.data.formats.images import HubPicture
from fedalt.errors import UserError, did_you_mean, listed, needs
from fedalt.hub import out_of_reach
from fedalt.registry import SOURCES

_ENDINGS = {".parquet", ".arrow", ".csv", ".tsv", ".json", ".jsonl"}
_UNLABELLED = -1


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` has written the folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def is_loadable(folder: Path) -> bool:
    """Whether ``load_dataset`` is worth a try."""
    return any(path.suffix in _ENDINGS for path in folder.rglob("*"))


def read_hub(name: str, config: DataConfig) -> Pool:
    """Load a data set; class numbers become their names, an unlabelled test split gives way to validation rows.

    Args:
        name: Name on the hub, or a folder.
        config: ``data.config`` chooses among a data set's configurations.
    """
    has_header(config, name)
    source = f"{name}/{config.config}" if config.config else name
    return from_datasets(_load(name, config.config), source, config)


def from_datasets(loaded: Any, source: str, config: DataConfig, task: str | None = None) -> Pool:
    """Rows of a loaded ``Dataset``, or of several by split; class numbers and splits as for ``read_hub``.

    Args:
        loaded: The data set, or split → data set.
        source: What the pool is called.
        config: Names of columns and labels.
        task: Task of rows that name none; the last part of ``source`` when not given.
    """
    found, notes = _named(loaded, source)
    records = {split: _records(rows, f"{source}: {split}", config) for split, rows in found.items()}
    for split in records.keys() - {"train"}:
        if find_label(config, found[split].column_names) is None:
            records[split] = None
    labelled = {split: mine for split, mine in records.items() if mine is not None}
    if "train" not in labelled:
        raise UserError(f"{source}: the training rows have no labels")
    notes += tuple(
        f"{source}: the {split} rows have no labels and are not used" for split in sorted(records.keys() - labelled)
    )
    if "test" in records and "test" not in labelled and "validation" in labelled:
        labelled["test"] = labelled.pop("validation")
        notes += (f"{source}: validation rows take the place of test rows",)
    pool = to_pool(config, labelled, source, "a Hugging Face data set", task=task)
    return replace(pool, notes=(*pool.notes, *notes))


def _load(name: str, config: str | None) -> Any:
    with needs("datasets", "Hugging Face data sets"):
        import datasets
    datasets.disable_progress_bars()
    folder = Path(name).expanduser()
    why = "" if folder.is_dir() else out_of_reach()
    try:
        if folder.is_dir() and is_saved(folder):
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(str(folder) if folder.is_dir() else name, config)
    except Exception as error:  # whatever builders, readers and the network raise: the data set cannot be had
        reason = why or " ".join(str(error).split()) or type(error).__name__
        missing = (
            f"{name} is no folder{did_you_mean(name, SOURCES)} and no file, nor a data set of the hub that can be had"
        )
        what = f"{name} cannot be loaded" if folder.is_dir() else missing
        raise UserError(f"data.source: {what}: {reason[:300]}") from None


def _named(found: Any, source: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Split → rows, under our names; splits that are left over get a note."""
    by_name: dict[str, Any] = dict(found) if isinstance(found, dict) else {"train": found}
    if "train" not in by_name:
        if len(by_name) > 1:
            raise UserError(f"{source}: no split is called train; it has {listed(list(by_name))}")
        by_name = {"train": next(iter(by_name.values()))}
    chosen = {
        split: next((by_name[name] for name in (*names, f"{split}_matched") if name in by_name), None)
        for split, names in NAMES.items()
    }
    used = {id(rows) for rows in chosen.values()}
    rest = [name for name, rows in by_name.items() if id(rows) not in used]
    notes = (f"{source}: splits not used: {listed(rest)}",) if rest else ()
    return {split: rows for split, rows in chosen.items() if rows is not None}, notes


def _records(rows: Any, where: str, config: DataConfig) -> list[Record] | None:
    """Records of a split, or nothing when no row of it has a label."""
    import datasets

    classes = {name: f.names for name, f in rows.features.items() if isinstance(f, datasets.ClassLabel)}
    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if len(images) > 1:
        raise UserError(f"{where}: several columns of images: {', '.join(images)}")
    column = images[0] if images else None
    if column:
        rows = rows.cast_column(column, datasets.Image(decode=False))
    values = list(rows.remove_columns(images))
    label = find_label(config, rows.column_names)
    if label and values and all(value[label] in (None, _UNLABELLED) for value in values):
        return None
    names = [f"{where} row {i}" for i in range(len(values))]
    pictures = [HubPicture(rows, column, i, name) if column else None for i, name in enumerate(names)]
    for picture in pictures:
        if picture:
            picture.verify()
    return [
        Record(_with_names(value, classes), name, name, picture)
        for value, name, picture in zip(values, names, pictures, strict=True)
    ]


def _with_names(value: Mapping[str, Any], classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The same row with names of classes for their numbers; a class that is not known is nothing."""
    unknown = (None, _UNLABELLED)
    return dict(value) | {n: None if value[n] in unknown else of[value[n]] for n, of in classes.items()}
