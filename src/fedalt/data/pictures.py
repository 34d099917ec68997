"""Pictures of rows: in a file, in memory, or in a Hugging Face data set; read when they are needed."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedalt.errors import UserError
from fedalt.extras import needs

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
        """Look through the file and decode its pixels.

        Raises:
            UserError: It is no image, or a broken one.
        """
        _verify(self._bytes(), str(self.path))

    def _bytes(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None


@dataclass(frozen=True, slots=True)
class ArrayPicture:
    """Pixels in memory.

    Attributes:
        pixels: Rows of bytes from the top.
        size: Width and height.
        mode: ``L`` (grey) or ``RGB``.
    """

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
        rows: One split of the data set.
        column: Its image column.
        index: The row.
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
        """Look through the encoded image and decode its pixels.

        Raises:
            UserError: It is no image, or a broken one.
        """
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
