"""The app of a run: a ``pyproject.toml`` with the run's settings, and nothing else; all code is in the package.

A site takes no other. It looks at what it was sent in memory, and of an app that it takes, too, nothing is written,
imported or read again: ``node.py`` and ``tasks.py`` see to that.
"""

from __future__ import annotations

import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any

from fedalt.errors import UserError, shortened

PROJECT = "pyproject.toml"
_LIST = ".info/CONTENT"
"""Flower's list of a bundle's files."""
_MOST = 1 << 20
"""Bytes of a ``pyproject.toml``, and of a bundle, at most."""
_LINE = 200
_NAMED = 5
_NONE = object()
_SETTINGS = {"settings": str, "resume": bool, "overwrite": bool, "by": str}


def app_with(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``pyproject.toml`` for these values of ``[tool.flwr.app.config]``."""
    components = {"serverapp": "fedalt.flower.server_app:app", "clientapp": "fedalt.flower.client_app:app"}
    flower = {"publisher": "fedalt", "components": components, "config": dict(settings)}
    about = {"description": "A run of fedalt", "license": "Apache-2.0", "dependencies": list[str]()}
    return {"project": {"name": "fedalt-run", "version": "1.0.0", **about}, "tool": {"flwr": {"app": flower}}}


_ALLOWED = "a site runs fedalt's own app from its own installation, and takes settings only (fedalt submit)"


def check_bundle(content: bytes) -> None:
    """Refuse every bundle (FAB) that is not settings for the installed package."""
    try:
        odd = _odd(content)
    except Exception as error:  # zip and TOML have a dozen ways to be broken, and a site has to live on
        odd = [f"what cannot be read ({shortened(f'{type(error).__name__}: {error}')})"]
    if odd:
        more = f", … ({len(odd)} in all)" if odd[_NAMED:] else ""
        named = "".join(c if c.isprintable() else "?" for c in ", ".join(map(shortened, odd[:_NAMED])))
        raise UserError(f"refused: the app of this run has {named}{more}; {_ALLOWED}")


def _odd(content: bytes) -> list[str]:
    """What is in a bundle besides settings; nothing is read further than it may be long."""
    if len(content) > _MOST:
        return [f"{len(content):,} bytes"]
    with zipfile.ZipFile(BytesIO(content)) as bundle:
        files = {info.filename: info for info in bundle.infolist()}
        if files.keys() != {PROJECT, _LIST} or len(bundle.infolist()) != len(files):
            return sorted(files.keys() - {PROJECT, _LIST}) or [f"no single {PROJECT}"]
        if files[PROJECT].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others are read whole
            return [f"{PROJECT}, compressed in another way than zip's own"]
        with bundle.open(PROJECT) as file:
            text = file.read(_MOST + 1)
    if len(text) > _MOST:
        return [f"{PROJECT} of more than {_MOST:,} bytes"]
    if any(len(line) > _LINE and not line.startswith(b'settings = "') for line in text.splitlines()):
        return [f"{PROJECT} with a line of more than {_LINE:,} bytes"]  # keys of so many parts take minutes to parse
    sent, ours = dict(_flat(tomllib.loads(text.decode()))), dict(_flat(app_with({})))
    settings = {name: sent.pop(f"tool.flwr.app.config.{name}", None) for name in _SETTINGS}
    odd = [_said(name, value) for name, value in sent.items() if ours.get(name, _NONE) != value]
    odd += [f"no {name}" for name in sorted(ours.keys() - sent.keys() - {"tool.flwr.app.config"})]
    return odd + [_said(f"config.{n}", value) for n, value in settings.items() if type(value) is not _SETTINGS[n]]


def _said(name: str, value: object) -> str:
    return f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {type(value).__name__}"


def _flat(values: Mapping[str, Any], above: str = "", depth: int = 5) -> Iterator[tuple[str, Any]]:
    """Settings by their whole names; what is deeper than any of ours stays as it is."""
    for name, value in values.items():
        if isinstance(value, dict) and value and depth:
            yield from _flat(value, f"{above}{name}.", depth - 1)
        else:
            yield above + name, value
