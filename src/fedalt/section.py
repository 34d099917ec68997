"""The base of every section of the configuration."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false are allowed for switches only")
        return value


class Settings(Section):
    """Settings of a method of one's own, or of another thing with a name: a section of the YAML, under that name.

    >>> import fedalt as fa
    >>> class Mine(fa.Settings):
    ...     mu: float = 0.01
    >>> Mine(mu=1).mu
    1.0

    Fields have a type and a default; a key that is none of them is refused, and so is a value of another type.
    """
