"""What a site says for itself, and no server can: its rows and how they are read, its base, what it tells of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, field_validator

from fedalt.config.data import text_keys
from fedalt.config.hints import explain
from fedalt.config.section import Section
from fedalt.errors import UserError
from fedalt.flower.requests import Text

COLUMNS = ("config", "files", "text_columns", "label_column", "columns", "label_names")
"""Settings of ``data`` that say how a source is read."""


class SiteRows(Section):
    """The site's own settings, of its command line and its ``site.json``.

    Attributes:
        data: Its rows, in any form that ``data.source`` takes.
        model: Where its copy of the base model is.
        device: Where it trains.
    """

    data: str | None = None
    model: str | None = None
    device: str | None = None
    task: Text | None = Field(None, description="what the server may call its task; the client's number if not given")
    min_rows: int = Field(10, ge=1, description="fewest rows that it trains on, and of which a score leaves it")
    secure: bool = Field(False, description="take part only where the server sees the sum of all uploads alone")
    epsilon: float | None = Field(
        None, gt=0, description="take part only with noise, by which the whole run tells no more of any row than this"
    )
    categories: tuple[str, ...] = Field((), description="categories that the server may have scores of, by name")
    config: str | None = Field(None, description="as data.config, and the next as those of data")
    files: Literal["clients", "splits", "pool"] | None = None
    text_columns: tuple[str, ...] | None = Field(None, min_length=1)
    label_column: str | None = None
    columns: tuple[str, ...] | None = Field(None, min_length=1)
    label_names: Annotated[dict[str, str], BeforeValidator(text_keys)] | None = None

    @field_validator("categories")
    @classmethod
    def _short(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            try:
                TypeAdapter(Text).validate_python(name)
            except ValidationError:
                raise ValueError("a category's name has at most 64 characters, in one line") from None
        return names


def site_rows(values: Mapping[str, Any]) -> SiteRows:
    """What a site says for itself, validated."""
    try:
        rows = SiteRows.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error.errors()[0], SiteRows, "--set")) from None
    if rows.data is None and (given := [name for name in COLUMNS if getattr(rows, name) is not None]):
        raise UserError(f"--set {given[0]}: says how --data is read; give that, too")
    return rows
