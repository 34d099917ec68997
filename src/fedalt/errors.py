"""The one exception that means "your input is wrong": a clear line for the user, exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """What was wrong, where, and what is allowed; the command line prints it as one line, without a traceback.

    Whatever reads what a user gave may raise it; docstrings below the public API do not repeat this.
    """


class LeftError(Exception):
    """An interrupt, and what goes on all the same, for the one line that says how the command ended."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``' (did you mean "x"?)'`` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word[:100], list(known), n=1, cutoff=0.5)
    return f' (did you mean "{close[0]}"?)' if close else ""


def choose(where: str, name: str, known: Iterable[str]) -> str:
    """``name``, if it is known; ``where`` it stands begins the line if not."""
    names = list(known)
    if name not in names:
        raise UserError(f'{where}: "{name}" is unknown{did_you_mean(name, names)}; known: {", ".join(names)}')
    return name


def listed(values: Sequence[object], most: int = 20) -> str:
    """The values in one line, or the first ones and how many there are."""
    text = ", ".join(map(str, values[:most]))
    return text if len(values) <= most else f"{text}, … ({len(values)} in all)"


def shortened(text: str, most: int = 60) -> str:
    """The text in one line, without its middle where it is longer than ``most`` characters."""
    line = " ".join(text[: 2 * most].split()) + (text[2 * most :] and "…")
    return line if len(line) <= most else f"{line[: most - 20]}… ({len(text):,} characters)"


def first_line(error: Exception) -> str:
    """What a library's error says, in its first line."""
    return (str(error).strip() or type(error).__name__).split("\n", maxsplit=1)[0].rstrip(".")


def alternatives(words: Sequence[object]) -> str:
    """``a, b or c``."""
    *first, last = map(str, words)
    return f"{', '.join(first)} or {last}" if first else last


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Around an import: a library that is missing becomes one line that says how to install it."""
    try:
        yield
    except ImportError as error:
        name = f" ({error.name} is missing)" if error.name else ""
        raise UserError(f"{what} need pip install 'fedalt[{extra}]'{name}") from None
