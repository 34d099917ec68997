"""Image folders: a subfolder per class, maybe below ``train/``, ``validation/`` and ``test/``."""

from __future__ import annotations

from pathlib import Path

from fedalt.data.options import DataConfig
from fedalt.data.pictures import FilePicture
from fedalt.data.pool import Pool
from fedalt.data.sources.columns import Record, has_header, to_pool
from fedalt.data.sources.table import NAMES
from fedalt.errors import UserError

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def read_images(folder: Path, config: DataConfig) -> Pool:
    """Read and verify every image; the folder's name is the label.

    Raises:
        UserError: An image that is none, a class without images, two folders for a split.
    """
    has_header(config, str(folder))
    splits = {split: _split(folder, split) for split in NAMES}
    below = {split: inside for split, inside in splits.items() if inside}
    if "train" not in below:
        below = {"train": folder}
    return to_pool(config, {s: _records(inside, folder) for s, inside in below.items()}, str(folder), "an image folder")


def is_image_folder(folder: Path) -> bool:
    """Whether there are images in subfolders, or in subfolders of ``train/``."""
    return any(_images(inside) for top in (folder, folder / "train") if top.is_dir() for inside in _classes(top))


def _split(folder: Path, split: str) -> Path | None:
    found = [inside for name in NAMES[split] if (inside := folder / name).is_dir() and _classes(inside)]
    if len(found) > 1:
        raise UserError(f"{folder}: {split} images twice, in {found[0].name}/ and {found[1].name}/")
    return found[0] if found else None


def _records(folder: Path, top: Path) -> list[Record]:
    records = []
    for inside in _classes(folder):
        images = _images(inside)
        if not images:
            raise UserError(f"{inside}: no images of this class; endings are {', '.join(sorted(ENDINGS))}")
        for path in images:
            picture = FilePicture(path)
            picture.verify()
            records.append(Record({"label": inside.name}, str(path), path.relative_to(top).as_posix(), picture))
    return records


def _classes(folder: Path) -> list[Path]:
    return sorted(inside for inside in folder.iterdir() if inside.is_dir() and not inside.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS and path.is_file())
