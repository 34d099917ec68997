"""Libraries that are not always installed: which extra brings them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedalt.errors import UserError


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Around an import: a library that is missing becomes one line that says how to install it."""
    try:
        yield
    except ImportError as error:
        name = f" ({error.name} is missing)" if error.name else ""
        raise UserError(f"{what} need pip install 'fedalt[{extra}]'{name}") from None
