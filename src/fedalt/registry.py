"""One kind of table for everything with a name: methods, metrics, partitioners, aggregators, sources, templates.

A table is filled by its decorator, by entry points of installed packages (``fedalt.methods``, ``fedalt.metrics``, …),
and by ``FILE.py:Name`` or ``module:Name`` wherever a name is expected. Code is never sent anywhere: every machine of
a run holds the file, and the digest of its text is part of the run's identity.

What is known of a thing is in attributes of its function or class, which the decorator sets: ``register(name,
corpus=True)``.
A class may have settings: a nested ``Settings``, which is a section of the YAML named after it. An instance is made
without arguments, and has them as ``self.settings`` before its ``__init__`` runs.
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
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator

from fedalt.errors import UserError, alternatives, did_you_mean, listed, shortened
from fedalt.files import read_bytes

T = TypeVar("T")
OURS, SESSION = "fedalt", "session"
HELD = "FEDALT_PLUGINS"
"""Environment variable with the files of code that an administrator lets runs of others use."""
_FILES = "fedalt_plugin_"
"""Modules made from files start with this, followed by the file's digest."""
_PLUGINS: dict[str, ModuleType] = {}
"""File or module → what was last imported from it."""


@dataclass(frozen=True)
class Entry(Generic[T]):
    """Something with a name.

    Attributes:
        name: Its name on the command line, in YAML files and in tables.
        origin: ``fedalt``, ``file PATH``, ``package NAME``, or ``session`` for what a notebook or prompt has defined.
        digest: SHA-256 of the source file of an outside thing; None for ours.
        module: The module that has registered it.
    """

    name: str
    value: T
    origin: str = OURS
    digest: str | None = None
    module: str = ""


class Registry(Generic[T]):
    """The things of one kind, by name.

    Args:
        kind: What they are called in messages, such as ``method``.
        group: Entry points of installed packages.
        home: Our own package or module whose import registers ours; all modules of a package are imported.
        accepts: Whether something can be registered; for what ``FILE.py:Name`` finds.
        wanted: What ``accepts`` asks for, in words.
        attributes: What ``register`` can say about a thing of this kind.
        reserved: Names that mean something else where things of this kind are named.
        open: Whether a path or another name may stand where a name of this kind is expected.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        home: str,
        *,
        accepts: Callable[[Any], bool] = callable,
        wanted: str = "a function or a class",
        attributes: Sequence[str] = (),
        reserved: Sequence[str] = (),
        open: bool = False,
    ) -> None:
        self.kind, self.group, self.home, self.open = kind, group, home, open
        self._accepts, self._wanted, self._attributes, self._reserved = accepts, wanted, attributes, reserved
        self._entries: dict[str, Entry[T]] = {}
        self._complete = False

    def register(self, name: str, **attributes: Any) -> Callable[[Any], Any]:
        """A decorator that gives its class or function a name here, and attributes."""
        for key in attributes:
            if key not in self._attributes:
                raise UserError(
                    f'{self.kind} "{name}": nothing is known of "{key}"{did_you_mean(key, self._attributes)}; '
                    f"known: {listed(self._attributes) or 'nothing'}"
                )
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise UserError(
                f'{self.kind} "{name}": a name has letters, digits and underscores, and starts with a letter'
            )

        def decorate(value: Any) -> Any:
            for key, known in attributes.items():
                setattr(value, key, known)
            self.add(name, value)
            return value

        return decorate

    def add(self, name: str, value: T, module: str | None = None) -> None:
        """Give something a name; ``module`` says where it comes from, if it cannot say so itself."""
        module = module or str(getattr(value, "__module__", ""))
        origin, digest = _origin(module, value)
        if origin != OURS:
            self._load()  # a collision with one of ours is found whoever is imported first
        if name in self._reserved:
            raise UserError(f'{self.kind} "{name}" of {origin}: the name means something else here; choose another')
        old = self._entries.get(name)
        again = old and (old.origin == origin or old.digest == digest is not None)  # a cell or a file that runs again
        if old and not again:
            raise UserError(f'{self.kind} "{name}" of {origin}: {old.origin} has one of this name; choose another')
        self._entries[name] = Entry(name, value, origin, digest, module)
        if inspect.isclass(value) and hasattr(value, "name") and not vars(value).get("name"):
            value.name = name

    def get(self, name: str) -> T:
        """The thing behind a name."""
        return self.entry(name).value

    def entry(self, name: str) -> Entry[T]:
        """The thing behind a name, and where it comes from."""
        if name not in self:
            known = self.names()
            short = name if len(name) <= 80 else name[:77] + "…"
            raise UserError(
                f'{self.kind}: "{short}" is unknown{did_you_mean(short, known)}; known: {listed(known, 60)}'
            )
        return self._entries[name]

    def make(self, name: str, settings: Callable[[str, type[Any]], Any], shared: Any = None) -> Any:
        """Something to call: a function as it is, or an instance of a class.

        Args:
            name: Its name.
            settings: From a section and its class to the settings there.
            shared: What ``self.settings`` is where the class has no ``Settings`` of its own: the section of the YAML
                where things of this kind are named.
        """
        value = self.get(name)
        if not inspect.isclass(value):
            return value
        own = settings_of(value)
        made: Any = value.__new__(value)
        made.settings = settings(section_of(self.entry(name)), own) if own else shared
        with self.blamed(name):
            value.__init__(made)
        return made

    @contextmanager
    def blamed(self, name: str) -> Iterator[None]:
        """Errors of outside code become one line that says whose code it is; those of ours stay as they are."""
        entry = self.entry(name)
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if entry.origin == OURS:
                raise
            module = sys.modules.get(getattr(entry.value, "__module__", ""))
            line = _line_of(error, Path(getattr(module, "__file__", None) or ""))
            text = " ".join(str(error).split())
            raise UserError(f'{self.kind} "{name}" of {entry.origin}{line}: {type(error).__name__}: {text}') from None

    def reference(self, text: str) -> tuple[str, str] | None:
        """``FILE.py:Name`` or ``module:Name`` as its two parts; None for a plain name.

        Where paths and other names may stand, too, a reference is what has ``.py`` before the colon, or an importable
        module that holds the name; a file or folder that is called so is none.
        """
        parts = split_reference(text) if self.points_at_code(text) else None
        if parts is None or not self.open or parts[0].endswith(".py"):
            return parts
        place, name = parts
        return parts if hasattr(import_plugin(place), name) else None

    def points_at_code(self, text: str) -> bool:
        """Whether a text might be a reference; found out without importing anything."""
        parts = split_reference(text)
        if parts is None or not self.open or parts[0].endswith(".py"):
            return parts is not None
        return not Path(text).exists() and _importable(parts[0].partition(".")[0])

    def resolve(self, text: str) -> str:
        """The name behind a name, ``FILE.py:Name`` or ``module:Name``; a file or module is imported."""
        return self.name_in(*outside) if (outside := self.reference(text)) else self.entry(text).name

    def name_in(self, place: str, name: str) -> str:
        """The registered name of something in a file or module; it is registered now if it has not been."""
        module = import_plugin(place)
        found, known = vars(module), list(self._own(module))
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
            self.add(_name_of(name, value), value, module.__name__)
            entry = next(entry for entry in self._entries.values() if entry.value is value)
        return entry.name

    def names(self) -> tuple[str, ...]:
        """All names: ours first, in the order of their modules."""
        return tuple(entry.name for entry in self.entries())

    def entries(self) -> tuple[Entry[T], ...]:
        """Everything with a name."""
        self._load()
        return tuple(sorted(self._entries.values(), key=lambda e: (e.origin != OURS, e.origin == OURS and e.module)))

    def _own(self, module: ModuleType) -> dict[str, T]:
        """What a plugin defines that could be registered here."""
        own = {
            key: value
            for key, value in list(vars(module).items())
            if isinstance(value, str) or getattr(value, "__module__", "") == module.__name__
        }
        return {key: value for key, value in own.items() if not key.startswith("_") and self._accepts(value)}

    def adopt(self, name: str, places: Sequence[str]) -> None:
        """Register what some plugins define under a name and do not register themselves.

        A run names it by ``FILE.py:Name`` once; from then on its settings have the name, and the file among plugins.
        """
        for place in places:
            module = import_plugin(place)
            for key, value in self._own(module).items():
                if _name_of(key, value) == name:
                    self.add(name, value, module.__name__)

    def forget(self, origin: str, digest: str) -> None:
        """Drop what an earlier text of a file has registered."""
        self._entries = {n: e for n, e in self._entries.items() if e.origin != origin or e.digest == digest}

    def __contains__(self, name: object) -> bool:
        if name not in self._entries:
            self._load()
        if name not in self._entries and isinstance(name, str):
            self.adopt(name, list(_PLUGINS))
        return name in self._entries

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


def _importable(place: str) -> bool:
    try:
        return importlib.util.find_spec(place) is not None
    except (ImportError, ValueError):  # no such package, or no name of a module
        return False


def import_plugin(place: str) -> ModuleType:
    """The module of a file or of an installed package. A file is run once, whatever it is called, and stands alone."""
    if not place.endswith(".py"):
        try:
            _PLUGINS[place] = importlib.import_module(place)
            return _PLUGINS[place]
        except Exception as error:
            told = shortened(f"{type(error).__name__}: {error}", 200)
            raise UserError(f"{shortened(place)}: cannot be imported ({told})") from None
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"{place}: no such file")
    text = read_bytes(path)
    digest = hashlib.sha256(text).hexdigest()
    module, old = sys.modules.get(_FILES + digest) or _run(place, path, text), _PLUGINS.get(str(path))
    if old is not None and old is not module:
        sys.modules.pop(old.__name__, None)  # or it would not register anything when the file has this text again
        for registry in ALL:
            registry.forget(f"file {path}", digest)
    _PLUGINS[str(path)] = module
    return module


def _run(place: str, path: Path, text: bytes) -> ModuleType:
    name = _FILES + hashlib.sha256(text).hexdigest()
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


def absolute(place: str) -> str:
    """A file of code by its whole path; a module by its name."""
    return str(Path(place).expanduser().resolve()) if place.endswith(".py") else place


def hold_plugins(places: Sequence[str]) -> None:
    """Import what this machine holds for runs of others: files and modules; in processes started from here, too."""
    places = [absolute(place) for place in places]
    for place in places:
        import_plugin(place)
    os.environ[HELD] = os.pathsep.join(places)


def held_plugins() -> tuple[str, ...]:
    """What ``hold_plugins`` has named, imported."""
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


def _name_of(key: str, value: Any) -> str:
    """What something without a registered name is called: by its attribute ``name``, or by its own in small letters."""
    given = vars(value).get("name") if inspect.isclass(value) else None
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", key).lower()
    return given if isinstance(given, str) and given else snake


METHODS: Registry[Any] = Registry(
    "method",
    "fedalt.methods",
    "fedalt.methods",
    accepts=lambda value: hasattr(value, "bind") or hasattr(value, "method"),
    wanted="a method: derive it from fedalt.Method",
)
METRICS: Registry[Any] = Registry(
    "metric",
    "fedalt.metrics",
    "fedalt.evaluation.metrics",
    attributes=("title", "task", "corpus", "reads", "higher_is_better", "points", "unit", "digits"),
    reserved=("rows", "categories", "client_id", "client", "stemmer", "round", "point", "event", "time", "job"),
)
PARTITIONERS: Registry[Any] = Registry(
    "partitioner", "fedalt.partitioners", "fedalt.data.partition", attributes=("uses", "alpha", "fixed")
)
AGGREGATORS: Registry[Any] = Registry("aggregator", "fedalt.aggregators", "fedalt.methods.aggregators")
SOURCES: Registry[Any] = Registry("source", "fedalt.sources", "fedalt.data.sources", open=True)
TEMPLATES: Registry[Any] = Registry(
    "template",
    "fedalt.templates",
    "fedalt.data.encode",
    accepts=lambda value: isinstance(value, str) or callable(value),
    wanted="a text or a function",
    open=True,
)
TRACKERS: Registry[Any] = Registry(
    "tracker",
    "fedalt.trackers",
    "fedalt.runs.trackers",
    accepts=lambda value: all(callable(getattr(value, act, None)) for act in ("start", "log", "finish")),
    wanted="a class with start, log and finish",
    reserved=("clients", "results", "checkpoints", "newcomers"),  # folders of a run
)
ALL: Sequence[Registry[Any]] = (METHODS, METRICS, PARTITIONERS, AGGREGATORS, SOURCES, TEMPLATES, TRACKERS)


def registered_name(registry: Registry[Any]) -> Any:
    """The type of a setting whose value is a name in a registry."""

    def known(name: str) -> str:
        if name not in registry:
            raise ValueError(f"must be {alternatives(registry.names())}{did_you_mean(name, registry.names())}")
        return name

    return Annotated[str, AfterValidator(known), registry]


def settings_of(value: Any) -> type[Any] | None:
    """The class of something's own settings; None where it has none."""
    settings = getattr(value, "Settings", None)
    return settings if settings is not None and settings.model_fields else None


def section_of(thing: Any) -> str:
    """The section of the YAML with the settings of something: of an entry, or of a class that has a name."""
    value = thing.value if isinstance(thing, Entry) else thing
    return str(getattr(value, "section", None) or thing.name)


def sections() -> Mapping[str, type[Any]]:
    """Section of the YAML → settings class, of everything that has settings of its own."""
    found: dict[str, type[Any]] = {}
    owners: dict[str, tuple[Registry[Any], Entry[Any]]] = {}
    for registry in ALL:
        for entry in registry.entries():
            settings = settings_of(entry.value)
            if settings is None:
                continue
            name = section_of(entry)
            kind, first = owners.setdefault(name, (registry, entry))
            if kind is not registry:
                raise UserError(
                    f'{registry.kind} "{entry.name}" of {entry.origin}: its settings would be the section "{name}", '
                    f"which is that of the {kind.kind} of {first.origin}; choose another name"
                )
            found[name] = settings
    return found
