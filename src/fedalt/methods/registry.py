"""From a name to a method that a run can take; variants, which are a method with some settings of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedalt.config import RunConfig, with_settings
from fedalt.methods.base import Method
from fedalt.registry import METHODS


@dataclass(frozen=True)
class Variant:
    """A method with some settings of its own, under a name.

    Attributes:
        method: Name of the method.
        title: Name in tables.
        settings: Dotted key → value.
    """

    method: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def get_method(name: str) -> type[Method]:
    """The class behind the name of a method or a variant.

    Raises:
        UserError: No such method; the closest name is suggested.
    """
    found = METHODS.get(name)
    method: type[Method] = METHODS.get(found.method) if isinstance(found, Variant) else found
    return method


def title_of(name: str) -> str:
    """How tables call a method or a variant."""
    return METHODS.get(name).title or name


def method_names() -> tuple[str, ...]:
    """Names of all methods, without variants."""
    return tuple(entry.name for entry in METHODS.entries() if not isinstance(entry.value, Variant))


def variant_names() -> tuple[str, ...]:
    """Names of all variants."""
    return tuple(entry.name for entry in METHODS.entries() if isinstance(entry.value, Variant))


def section_of(method: type[Method]) -> str:
    """The section of the YAML that holds a method's settings."""
    return method.section or method.name


def configured(config: RunConfig, name: str) -> RunConfig:
    """The settings with a method's name and section in place, and with what makes a variant of it.

    Raises:
        UserError: No such method.
    """
    method, found = get_method(name), METHODS.get(name)
    own = found.settings if isinstance(found, Variant) else {}
    config = with_settings(config, {"method": name, **own})
    if not method.Settings.model_fields:
        return config
    section = section_of(method)
    filled = {**config.sections, section: config.section(section, method.Settings)}
    return config.model_copy(update={"sections": filled})


def build(config: RunConfig, clients: int, layers: Mapping[str, tuple[int, int]] | None = None) -> Method:
    """The method of a configuration, bound to a federation.

    Args:
        config: The settings.
        clients: Number of clients.
        layers: Path of every adapted layer → (d_in, d_out); none where only settings are checked.

    Raises:
        UserError: No such method, or settings that do not suit it.
    """
    method = get_method(config.method)
    return method(config.section(section_of(method), method.Settings)).bind(clients, config, layers)
