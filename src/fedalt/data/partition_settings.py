"""Ways to partition rows among clients, as objects that fill the settings of ``data.partition``, and do no more."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class Partition:
    """What all ways have in common.

    Attributes:
        by: Name of the way in ``data.partition.by``.
        column: What rows are dealt by: ``label``, ``task``, ``category`` or a column of the source; the label when not
            given, the task where clients' rows are dealt anew.
        min_rows: Training rows that every client gets, or the settings are refused.
        test: Test and validation rows: dealt in the shares of training rows, or all of them for everybody.
    """

    by: ClassVar[str]
    column: str | None = None
    min_rows: int | None = None
    test: Literal["like_train", "shared"] | None = None

    def settings(self) -> dict[str, Any]:
        """Dotted key → value, of what was given."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        filled = {"by": self.by, **{name: value for name, value in given.items() if value is not None}}
        return {f"data.partition.{name}": value for name, value in filled.items()}


@dataclass(frozen=True)
class _Drawn(Partition):
    """Shares are drawn from Dir(alpha).

    Attributes:
        alpha: Concentration: small is uneven.
    """

    alpha: float | None = None


@dataclass(frozen=True)
class Iid(Partition):
    """Rows at random, the same number for everybody.

    >>> import fedalt as fa
    >>> data = fa.load_data("tinyworld", clients=4, partition=fa.Iid(), seed=0)
    >>> [len(rows.train) for rows in data.clients.values()]
    [600, 600, 600, 600]
    """

    by = "iid"


@dataclass(frozen=True)
class Dirichlet(_Drawn):
    """Rows of each label in shares drawn from Dir(alpha), for every label anew; alpha is 0.5 when not given.

    >>> import fedalt as fa
    >>> data = fa.load_data("tinyworld", clients=4, partition=fa.Dirichlet(0.5), seed=0)
    >>> len(data.clients)
    4
    """

    by = "dirichlet"


@dataclass(frozen=True)
class Pathological(Partition):
    """A few labels for each client (McMahan et al., AISTATS 2017).

    >>> import fedalt as fa
    >>> data = fa.load_data("tinyworld", clients=4, partition=fa.Pathological(2), seed=0)
    >>> [len({row.task for row in rows.train}) for rows in data.clients.values()]
    [2, 2, 2, 2]

    Attributes:
        classes_per_client: Labels of each. 2 when not given.
    """

    by = "pathological"
    classes_per_client: int | None = None


@dataclass(frozen=True)
class Column(Partition):
    """A client for every value of a column.

    >>> import fedalt as fa
    >>> data = fa.load_data("tinyworld", partition=fa.Column("category"))
    >>> len({row.category for row in data.clients[0].train})
    1
    """

    by = "column"
    column: str | None = None


@dataclass(frozen=True)
class Quantity(_Drawn):
    """Rows at random, in numbers drawn from Dir(alpha), 0.5 when not given (NIID-Bench).

    >>> import fedalt as fa
    >>> data = fa.load_data("tinyworld", clients=4, partition=fa.Quantity(1.0), seed=0)
    >>> len({len(rows.train) for rows in data.clients.values()}) > 1
    True
    """

    by = "quantity"


@dataclass(frozen=True)
class GLDirichlet(_Drawn):
    """Rows of each label in shares drawn from Dir(alpha), 0.3 when not given; GL-Dir of HiLoRA (arXiv 2603.02785).

    >>> import fedalt as fa
    >>> len(fa.load_data("tinyworld", clients=4, partition=fa.GLDirichlet(), seed=0).clients)
    4
    """

    by = "gl_dir"


@dataclass(frozen=True)
class SCDirichlet(_Drawn):
    """Categories are handed out, and the rows of each shared by Dir(alpha) among the clients that hold it.

    >>> import fedalt as fa
    >>> len(fa.load_data("tinyworld", clients=4, partition=fa.SCDirichlet(superclasses_per_client=2), seed=0).clients)
    4

    SC-Dir of HiLoRA (arXiv 2603.02785); alpha is 3 when not given.

    Attributes:
        superclasses_per_client: Categories of each client; 1 or 2, drawn, when not given.
        dir_level: What is shared by one draw: a category, or each label within it.
    """

    by = "sc_dir"
    superclasses_per_client: int | None = None
    dir_level: Literal["superclass", "class_in_superclass"] | None = None
