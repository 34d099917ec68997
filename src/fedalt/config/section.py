"""The base of every section of the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationInfo, field_validator


def as_list(value: Any) -> Any:
    """A command line has ``cuda:0,cuda:1``, or a single number."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return [value]
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def _is_list(kind: Any) -> bool:
    kinds = get_args(kind) if isinstance(kind, UnionType) or get_origin(kind) is Union else (kind,)
    return any(get_origin(one) in (tuple, list) for one in kinds)


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind is not bool:
            raise ValueError("true and false are allowed for switches only")
        if _is_list(kind):
            return as_list(value)
        whole = kind in (int, int | None)
        if whole and isinstance(value, int | float) and not -(2**63) <= value < 2**63 and abs(value) != float("inf"):
            raise ValueError("must have less than 20 digits")
        return value


@dataclass(frozen=True)
class Span:
    """Where ``compare --tune`` looks for a setting: from low to high, evenly in logarithms, or among some values.

    It stands in the type of a field: ``mu: Annotated[float, Span(0.001, 1)] = 0.01``.
    """

    low: float = 0
    high: float = 0
    values: tuple[Any, ...] = ()


class Settings(Section):
    """Settings of a method of one's own, or of another thing with a name: a section of the YAML, under that name.

    >>> import fedalt as fa
    >>> class Mine(fa.Settings):
    ...     mu: float = 0.01
    >>> Mine(mu=1).mu
    1.0

    Fields have a type and a default; a key that is none of them is refused, and so is a value of another type.
    """


S = TypeVar("S", bound=Section)


class Named(Section):
    """A section that names registered things, and knows the settings that they have in sections of their own."""

    _own: Mapping[str, Section] = PrivateAttr(default_factory=dict)

    def knowing(self, own: Mapping[str, Section]) -> Self:
        """The same with settings of registered things: name of the section → settings."""
        copy = self.model_copy()
        copy._own = dict(own)
        return copy

    @property
    def own(self) -> str:
        """The settings of registered things as one text, for finding out whether two are equal."""
        return str(self._own)

    def section(self, name: str, kind: type[S]) -> S:
        """The settings of a registered thing: those given, or its defaults."""
        return settings_in(self._own, name, kind)


def settings_in(own: Mapping[str, Section], name: str, kind: type[S]) -> S:
    """The settings of a registered thing among all that were given, or its defaults."""
    found = own.get(name)
    return found if isinstance(found, kind) else kind()
