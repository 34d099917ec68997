"""Settings of how rows are dealt to clients."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedalt.section import Section


class PartitionConfig(Section):
    """Who gets which rows, where a source has no clients of its own or they are to be dealt anew."""

    by: Literal["iid", "dirichlet", "pathological", "column", "quantity", "gl_dir", "sc_dir"] | None = Field(
        None, description="how rows are dealt; iid for rows without clients, clients as they are for others"
    )
    alpha: float | None = Field(
        None,
        gt=0,
        description="Dirichlet's concentration, small is uneven; .5 (dirichlet, quantity), .3 (gl_dir), 3 (sc_dir)",
    )
    classes_per_client: int = Field(2, ge=1, description="pathological: labels of each client")
    column: str | None = Field(
        None,
        description="what rows are dealt by: label, task, category or a column of the source; label if not given, task "
        "where clients' rows are dealt anew",
    )
    superclasses_per_client: int | None = Field(
        None, ge=1, description="sc_dir: categories of each client; 1 or 2, drawn, when not given"
    )
    dir_level: Literal["superclass", "class_in_superclass"] = Field(
        "class_in_superclass", description="sc_dir: what is shared by one draw, a category or each label within it"
    )
    min_rows: int = Field(10, ge=1, description="training rows that every client gets, or the settings are refused")
    test: Literal["like_train", "shared"] = Field(
        "like_train", description="test and validation rows: dealt in the shares of training rows, or all for everybody"
    )
    seed: int | None = Field(None, ge=0, description="seed of the deal; the run's when not given")
    file: str | None = Field(None, description="a partition.json whose clients get the same rows again")
