"""Method names live here and nowhere else."""

from __future__ import annotations

from fedalt.errors import UserError, did_you_mean
from fedalt.methods.base import Method
from fedalt.methods.fedalt import FedALT
from fedalt.methods.fedit import FedIT
from fedalt.methods.local import Local

METHODS: dict[str, type[Method]] = {method.name: method for method in (Local, FedIT, FedALT)}


def get_method(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        UserError: No such method; the closest name is suggested.
    """
    if name not in METHODS:
        raise UserError(f'method: "{name}" is unknown{did_you_mean(name, METHODS)}; known: {", ".join(METHODS)}')
    return METHODS[name]
