"""From a name to a method that a run can take; variants, which are a method with some settings of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedalt.config import RunConfig, used_entries, with_settings
from fedalt.errors import UserError
from fedalt.methods.base import Method
from fedalt.registry import METHODS, SESSION, section_of


@dataclass(frozen=True)
class Variant:
    """A method with some settings of its own, under a name.

    Attributes:
        method: Name of the method.
        title: Name in tables.
        settings: Dotted key → value.
        given: What tells it from the method itself, in words; for those that have no name of their own.
    """

    method: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    given: str = ""

    @property
    def section(self) -> str:
        """The method's section of the YAML."""
        return section_of(get_method(self.method))


def get_method(name: str) -> type[Method]:
    """The class behind the name of a method or a variant."""
    found = METHODS.get(name)
    method: type[Method] = METHODS.get(found.method) if isinstance(found, Variant) else found
    return method


def as_variant(method: str | type[Method] | Method) -> Variant:
    """A method as it may be given from Python, as the settings that name it.

    Args:
        method: A name, ``FILE.py:Name`` or ``module:Name``, a class, or a method with settings of its own.
    """
    if isinstance(method, str):
        return Variant(method, "")
    kind = method if isinstance(method, type) else type(method)
    if not issubclass(kind, Method):
        raise UserError(f"{kind.__name__} is not a method: derive it from fedalt.Method, or give a name")
    entry = next((entry for entry in METHODS.entries() if entry.value is kind), None)
    if entry is None:
        raise UserError(f'{kind.__name__} has no name: write @fedalt.method("name") above it')
    origin, _, place = entry.origin.partition(" ")
    name = f"{place}:{entry.name}" if origin in ("file", "package") else entry.name
    if isinstance(method, type):
        return Variant(name, "")
    own = {f"{section_of(kind)}.{key}": value for key, value in method.settings.model_dump().items()}
    given = ",".join(f"{key}={value}" for key, value in method.settings.model_dump(exclude_unset=True).items())
    return Variant(name, "", own, given)


def refuse_session(config: RunConfig, flag: str) -> None:
    """Refuse what other processes cannot see."""
    for kind, entry in used_entries(config):
        if entry.origin == SESSION:
            raise UserError(
                f"{flag}: the {kind} {entry.name} was defined in this session, which other processes cannot see; put "
                "it into a file and give FILE.py:Name"
            )


def title_of(name: str) -> str:
    """How tables call a method or a variant."""
    return METHODS.get(name).title or name


def method_names() -> tuple[str, ...]:
    """Names of all methods, without variants."""
    return tuple(entry.name for entry in METHODS.entries() if not isinstance(entry.value, Variant))


def configured(config: RunConfig, name: str) -> RunConfig:
    """The settings with a method's name and section in place, and with what makes a variant of it."""
    method, found = get_method(name), METHODS.get(name)
    own = found.settings if isinstance(found, Variant) else {}
    config = with_settings(config, {"method": name, **own})
    if not method.Settings.model_fields:
        return config
    section = section_of(method)
    filled = {**config.sections, section: config.section(section, method.Settings)}
    return config.model_copy(update={"sections": filled})


def build(config: RunConfig, clients: int, layers: Mapping[str, tuple[int, int]] | None = None) -> Method:
    """The method of a configuration, bound to a federation."""
    method = get_method(config.method)
    return method(config.section(section_of(method), method.Settings)).bind(clients, config, layers)
