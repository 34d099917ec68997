"""Pictures of rows, read when they are needed, and image folders."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedalt.config.data import DataConfig
from fedalt.data.federation import Pool
from fedalt.data.formats.columns import Record, has_header, to_pool
from fedalt.data.formats.files import NAMES
from fedalt.errors import UserError, needs

_BROKEN = (OSError, SyntaxError, ValueError, EOFError)
"""What PIL raises about files that are no images, or broken ones."""


@dataclass(frozen=True, slots=True)
class FilePicture:
    """An image file."""

    path: Path

    def open(self) -> Any:
        """The image."""
        return _decoded(self._bytes(), str(self.path))

    def digest(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self._bytes()).hexdigest()

    def verify(self) -> None:
        """Look through the file and decode its pixels."""
        _verify(self._bytes(), str(self.path))

    def _bytes(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None


@dataclass(frozen=True, slots=True)
class ArrayPicture:
    """Pixels in memory, rows of bytes from the top: ``L`` (grey) or ``RGB``."""

    pixels: bytes
    size: tuple[int, int]
    mode: str = "L"

    def open(self) -> Any:
        """The image."""
        return _pillow().frombytes(self.mode, self.size, self.pixels)

    def digest(self) -> str:
        """SHA-256 of mode, size and pixels."""
        return hashlib.sha256(f"{self.mode} {self.size} ".encode() + self.pixels).hexdigest()


@dataclass(frozen=True, slots=True)
class HubPicture:
    """An image in a row of a Hugging Face data set, whose column is not decoded.

    Attributes:
        name: Source, split and row, for people.
    """

    rows: Any = field(compare=False, repr=False)
    column: str
    index: int
    name: str

    def open(self) -> Any:
        """The image."""
        return _decoded(self._bytes(), self.name)

    def digest(self) -> str:
        """SHA-256 of the encoded image."""
        return hashlib.sha256(self._bytes()).hexdigest()

    def verify(self) -> None:
        """Look through the encoded image and decode its pixels."""
        _verify(self._bytes(), self.name)

    def _bytes(self) -> bytes:
        value = self.rows[self.index][self.column]
        if value["bytes"] is not None:
            return bytes(value["bytes"])
        return FilePicture(Path(value["path"]))._bytes()


def _verify(data: bytes, name: str) -> None:
    """Checksums and the end of the file, which loading passes over; and pixels, which ``verify`` of PIL does."""
    with _readable(name) as image_class, image_class.open(io.BytesIO(data)) as image:
        image.verify()
    _decoded(data, name)


def _decoded(data: bytes, name: str) -> Any:
    with _readable(name) as image_class:
        image = image_class.open(io.BytesIO(data))
        image.load()
    return image


@contextmanager
def _readable(name: str) -> Iterator[Any]:
    image_class = _pillow()
    try:
        yield image_class
    except (*_BROKEN, image_class.DecompressionBombError):
        raise UserError(f"{name}: no image, or a broken one") from None


def _pillow() -> Any:
    with needs("vision", "images"):
        from PIL import Image
    return Image


ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def read_images(folder: Path, config: DataConfig) -> Pool:
    """Read and verify every image; the folder's name is the label."""
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
