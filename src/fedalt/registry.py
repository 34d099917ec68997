"""One kind of table for everything with a name: methods, metrics, partitioners, aggregators, sources, templates.

A table is filled by its decorator, by entry points of installed packages (``fedalt.methods``, ``fedalt.metrics``, …),
and by ``FILE.py:Name`` or ``module:Name`` wherever a name is expected. Code is never sent anywhere: every machine of
a run holds the file, and the digest of its text is part of the run's identity.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator

from fedalt.errors import UserError, alternatives, did_you_mean, listed, shortened

T = TypeVar("T")
OURS, SESSION = "fedalt", "session"
HELD = "FEDALT_PLUGINS"
"""Environment variable with the files of code that an administrator lets runs of others use."""
_FILES = "fedalt_plugin_"
"""Modules made from files start with this, followed by the file's digest."""


@dataclass(frozen=True)
class Entry(Generic[T]):
    """Something with a name.

    Attributes:
        name: Its name on the command line, in YAML files and in tables.
        value: The thing itself.
        origin: ``fedalt``, ``file PATH``, ``package NAME``, or ``session`` for what a notebook or prompt has defined.
        digest: SHA-256 of the source file of an outside thing; None for ours.
    """

    name: str
    value: T
    origin: str = OURS
    digest: str | None = None


class Registry(Generic[T]):
    """The things of one kind, by name.

    Args:
        kind: What they are called in messages, such as ``method``.
        group: Entry points of installed packages.
        home: Our own package or module whose import registers ours; all modules of a package are imported.
        accepts: Whether something can be registered; for what ``FILE.py:Name`` finds.
        wanted: What ``accepts`` asks for, in words.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        home: str,
        accepts: Callable[[Any], bool] = callable,
        wanted: str = "a function or a class",
    ) -> None:
        self.kind, self.group, self.home = kind, group, home
        self._accepts, self._wanted = accepts, wanted
        self._entries: dict[str, Entry[T]] = {}
        self._complete = False

    def register(self, name: str) -> Callable[[Any], Any]:
        """A decorator that gives its class or function a name here.

        Raises:
            UserError: The name is taken, or is none: letters, digits and underscores, first a letter.
        """
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise UserError(
                f'{self.kind} "{name}": a name has letters, digits and underscores, and starts with a letter'
            )

        def decorate(value: Any) -> Any:
            self.add(name, value)
            return value

        return decorate

    def add(self, name: str, value: T, module: str | None = None) -> None:
        """Give something a name; ``module`` says where it comes from, if it cannot say so itself."""
        origin, digest = _origin(module or str(getattr(value, "__module__", "")), value)
        if origin != OURS:
            self._load()  # a collision with one of ours is found whoever is imported first
        old = self._entries.get(name)
        again = old and (old.origin == origin or old.digest == digest is not None)  # a cell or a file that runs again
        if old and not again:
            raise UserError(f'{self.kind} "{name}" of {origin}: {old.origin} has one of this name; choose another')
        self._entries[name] = Entry(name, value, origin, digest)
        if inspect.isclass(value) and hasattr(value, "name") and not vars(value).get("name"):
            value.name = name

    def get(self, name: str) -> T:
        """The thing behind a name.

        Raises:
            UserError: No such name; the closest one is suggested.
        """
        return self.entry(name).value

    def entry(self, name: str) -> Entry[T]:
        """The thing behind a name, and where it comes from.

        Raises:
            UserError: See ``get``.
        """
        if name not in self._entries:
            self._load()
        if name not in self._entries:
            known = self.names()
            short = name if len(name) <= 80 else name[:77] + "…"
            raise UserError(
                f'{self.kind}: "{short}" is unknown{did_you_mean(short, known)}; known: {listed(known, 60)}'
            )
        return self._entries[name]

    def resolve(self, text: str) -> str:
        """The name behind a name, ``FILE.py:Name`` or ``module:Name``; a file or module is imported.

        Raises:
            UserError: There is no such file, module or name in it, or it is of another kind.
        """
        return self.name_in(*outside) if (outside := split_reference(text)) else self.entry(text).name

    def name_in(self, place: str, name: str) -> str:
        """The registered name of something in a file or module; it is registered now if it has not been.

        Raises:
            UserError: See ``resolve``.
        """
        module = import_plugin(place)
        found = vars(module)
        own = {key: value for key, value in found.items() if getattr(value, "__module__", "") == module.__name__}
        known = [key for key, value in own.items() if not key.startswith("_") and self._accepts(value)]
        by_name = next((e for e in self._entries.values() if e.name == name and _is_of(e.value, module)), None)
        if by_name:
            return by_name.name
        if name not in found:
            raise UserError(f'{self.kind}: {place} has no "{name}"{did_you_mean(name, known)}; it has {listed(known)}')
        value = found[name]
        if not self._accepts(value):
            raise UserError(f"{self.kind}: {name} in {place} is not {self._wanted}")
        entry = next((entry for entry in self._entries.values() if entry.value is value), None)
        if entry is None:
            given = vars(value).get("name") if inspect.isclass(value) else None
            self.add(given if isinstance(given, str) and given else _snake(name), value, module.__name__)
            entry = next(entry for entry in self._entries.values() if entry.value is value)
        return entry.name

    def names(self) -> tuple[str, ...]:
        """All names: ours first, in the order of their modules."""
        return tuple(entry.name for entry in self.entries())

    def entries(self) -> tuple[Entry[T], ...]:
        """Everything with a name."""
        self._load()
        return tuple(self._entries.values())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _load(self) -> None:
        """Import ours, and what installed packages announce."""
        if self._complete:
            return
        self._complete = True
        home = importlib.import_module(self.home)
        for module in pkgutil.iter_modules(getattr(home, "__path__", ())):
            importlib.import_module(f"{self.home}.{module.name}")
        for point in entry_points(group=self.group):
            try:
                value = point.load()
            except Exception as error:
                name = point.dist.name if point.dist else point.value
                raise UserError(f"{self.kind} {point.name} of the package {name} cannot be loaded: {error}") from None
            if point.name not in self._entries:
                self.add(point.name, value, point.module)


def split_reference(text: str) -> tuple[str, str] | None:
    """``FILE.py:Name`` or ``module:Name`` as its two parts; None for a plain name."""
    place, colon, name = text.rpartition(":")
    return (place, name) if colon and place and name.isidentifier() else None


def import_plugin(place: str) -> ModuleType:
    """The module of a file or of an installed package. A file is run once, whatever it is called, and stands alone.

    Raises:
        UserError: There is no such file or module, or it fails when it runs.
    """
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except Exception as error:
            told = shortened(f"{type(error).__name__}: {error}", 200)
            raise UserError(f"{shortened(place)}: cannot be imported ({told})") from None
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"{place}: no such file")
    text = path.read_bytes()
    name = _FILES + hashlib.sha256(text).hexdigest()
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        exec(compile(text, str(path), "exec", dont_inherit=True), module.__dict__)
    except UserError:
        del sys.modules[name]
        raise
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise UserError(f"{place}{_line_of(error, path)}: {type(error).__name__}: {error}") from None
    return module


def hold_plugins(places: Sequence[str]) -> None:
    """Import the files and modules that this machine holds for runs of others, here and in processes started from here.

    Raises:
        UserError: See ``import_plugin``.
    """
    places = [str(Path(place).expanduser().resolve()) if place.endswith(".py") else place for place in places]
    for place in places:
        import_plugin(place)
    os.environ[HELD] = os.pathsep.join(places)


def held_plugins() -> tuple[str, ...]:
    """What ``hold_plugins`` has named, imported.

    Raises:
        UserError: See ``import_plugin``.
    """
    places = tuple(place for place in os.environ.get(HELD, "").split(os.pathsep) if place)
    for place in places:
        import_plugin(place)
    return places


def _line_of(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f":{error.lineno}"
    lines, at = [], error.__traceback__
    while at:
        if at.tb_frame.f_code.co_filename == str(path):
            lines.append(at.tb_lineno)
        at = at.tb_next
    return f":{lines[-1]}" if lines else ""


def _origin(module: str, value: Any) -> tuple[str, str | None]:
    if module == OURS or module.startswith(f"{OURS}."):
        return OURS, None
    loaded = sys.modules.get(module)
    if module.startswith(_FILES) and loaded:
        return f"file {loaded.__file__ or vars(loaded)['__spec__'].origin}", module.removeprefix(_FILES)
    digest = _digest(loaded) if loaded else None
    if loaded is None or module == "__main__" or digest is None:
        return SESSION, _text_digest(value)
    return f"package {module}", digest


def _digest(module: ModuleType) -> str | None:
    if module.__name__.startswith(_FILES):
        return module.__name__.removeprefix(_FILES)
    file = getattr(module, "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else None


def _text_digest(value: Any) -> str | None:
    """Of the text of something defined in a session, however it is indented and commented."""
    try:
        text = ast.dump(ast.parse(inspect.cleandoc("\n" + inspect.getsource(value))))
    except (OSError, TypeError, SyntaxError):
        text = getattr(value, "__qualname__", str(value))
    return hashlib.sha256(text.encode()).hexdigest()


def _is_of(value: Any, module: ModuleType) -> bool:
    return getattr(value, "__module__", None) == module.__name__ or any(
        value is other for other in vars(module).values()
    )


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _is_method(value: Any) -> bool:
    return hasattr(value, "bind") or hasattr(value, "method")


METHODS: Registry[Any] = Registry(
    "method", "fedalt.methods", "fedalt.methods", _is_method, "a method: derive it from fedalt.Method"
)
METRICS: Registry[Any] = Registry("metric", "fedalt.metrics", "fedalt.evaluation.metrics")
PARTITIONERS: Registry[Any] = Registry("partitioner", "fedalt.partitioners", "fedalt.data.partition")
AGGREGATORS: Registry[Any] = Registry("aggregator", "fedalt.aggregators", "fedalt.methods.rows")
SOURCES: Registry[Any] = Registry("source", "fedalt.sources", "fedalt.data.load")
TEMPLATES: Registry[Any] = Registry(
    "template",
    "fedalt.templates",
    "fedalt.data.templates",
    lambda value: isinstance(value, str) or callable(value),
    "a text or a function",
)
TRACKERS: Registry[Any] = Registry("tracker", "fedalt.trackers", "fedalt.report.trackers")
ALL: Sequence[Registry[Any]] = (METHODS, METRICS, PARTITIONERS, AGGREGATORS, SOURCES, TEMPLATES, TRACKERS)


def registered_name(registry: Registry[Any]) -> Any:
    """The type of a setting whose value is a name in a registry."""

    def known(name: str) -> str:
        if name not in registry:
            raise ValueError(f"must be {alternatives(registry.names())}{did_you_mean(name, registry.names())}")
        return name

    return Annotated[str, AfterValidator(known), registry]


def sections() -> Mapping[str, type[Any]]:
    """Section of the YAML → settings class, of everything that has settings of its own."""
    found: dict[str, type[Any]] = {}
    for registry in ALL:
        for entry in registry.entries():
            settings = getattr(entry.value, "Settings", None)
            if settings is not None and settings.model_fields:
                found[getattr(entry.value, "section", None) or entry.name] = settings
    return found
