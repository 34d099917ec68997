"""Method names live here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

from fedalt.config import RunConfig
from fedalt.errors import UserError, did_you_mean
from fedalt.methods.base import Method
from fedalt.methods.fedalt import FedALT
from fedalt.methods.fedit import FedIT
from fedalt.methods.local import Local

METHODS: dict[str, type[Method]] = {method.name: method for method in (Local, FedIT, FedALT)}


@dataclass(frozen=True)
class Variant:
    """A method under other settings."""

    title: str


VARIANTS: dict[str, Variant] = {}
ABLATIONS: tuple[str, ...] = ("fedalt",)


def get_method(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        UserError: No such method; the closest name is suggested.
    """
    if name not in METHODS:
        raise UserError(f'method: "{name}" is unknown{did_you_mean(name, METHODS)}; known: {", ".join(METHODS)}')
    return METHODS[name]


def configured(config: RunConfig, name: str) -> RunConfig:
    """The configuration of a method or variant.

    Raises:
        UserError: No such name.
    """
    return config.model_copy(update={"method": get_method(name).name})


def title_of(name: str) -> str:
    """What people read instead of the name of a method or variant."""
    return VARIANTS[name].title if name in VARIANTS else get_method(name).title
