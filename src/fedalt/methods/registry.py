"""Method names live here and nowhere else: the methods themselves, and variants of them that are a few settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedalt.config import RunConfig, with_settings
from fedalt.errors import UserError, did_you_mean
from fedalt.methods.base import Method
from fedalt.methods.fdlora import FDLoRA
from fedalt.methods.fedalt import FedALT
from fedalt.methods.feddpa import FedDPAF, FedDPAT
from fedalt.methods.fedit import FedIT
from fedalt.methods.fedit_split import FedITSplit
from fedalt.methods.fedsa_lora import FedSALoRA
from fedalt.methods.ffa_lora import FFALoRA
from fedalt.methods.flexlora import FlexLoRA
from fedalt.methods.flora import FLoRA
from fedalt.methods.hetlora import HetLoRA
from fedalt.methods.local import Local
from fedalt.methods.lora_fair import LoRAFair
from fedalt.methods.pf2lora import PF2LoRA
from fedalt.methods.references import Centralized, ZeroShot
from fedalt.methods.zero_pad import ZeroPad

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Local,
        FedIT,
        FedITSplit,
        FFALoRA,
        FedSALoRA,
        FedDPAF,
        FedDPAT,
        PF2LoRA,
        FDLoRA,
        FedALT,
        LoRAFair,
        ZeroPad,
        HetLoRA,
        FlexLoRA,
        FLoRA,
        Centralized,
        ZeroShot,
    )
}


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


def _fedalt(title: str, **settings: Any) -> Variant:
    return Variant("fedalt", title, {f"fedalt.{key}": value for key, value in settings.items()})


VARIANTS: dict[str, Variant] = {
    "fedalt_row_update_half": _fedalt("RoW-Update, half rank", halved=True, row_update="discard"),
    "fedalt_row_update": _fedalt("RoW-Update", row_update="discard"),
    "fedalt_global_average": _fedalt("Global-avg", row_from="all"),
    "fedalt_fixed_half": _fedalt("fixed 1/2", mixing="half"),
    "fedalt_fixed_one_over_k": _fedalt("fixed 1/K", mixing="one_over_k"),
    "fedalt_averaged_mixer": _fedalt("averaged mixer", mixer_average=True),
    "fedalt_stack": _fedalt("FedALT, exact rows", row_aggregator="stack"),
    "fedalt_svd": _fedalt("FedALT, SVD rows", row_aggregator="svd"),
    "fedalt_fair": _fedalt("FedALT, fitted rows", row_aggregator="fair"),
    "fedalt_median": _fedalt("FedALT, median rows", row_aggregator="median"),
    "fedalt_trimmed_mean": _fedalt("FedALT, trimmed rows", row_aggregator="trimmed_mean"),
    "fedalt_krum": _fedalt("FedALT, Krum rows", row_aggregator="krum"),
    "fedalt_full_start": _fedalt("FedALT, full start", full_start=True),
    "fedalt_clusters": _fedalt("FedALT, 2 clusters", clusters=2),
}
ABLATIONS = (
    "fedalt",
    "fedalt_row_update_half",
    "fedalt_row_update",
    "fedalt_global_average",
    "fedalt_fixed_half",
    "fedalt_fixed_one_over_k",
    "fedalt_averaged_mixer",
)
"""The paper's Table 2 and Figure 3; its "r4" and "r8" of RoW-Update are half of ``lora.r`` = 8, and all of it."""


def get_method(name: str) -> type[Method]:
    """The class behind the name of a method or a variant.

    Raises:
        UserError: No such method; the closest name is suggested.
    """
    if name in VARIANTS:
        return METHODS[VARIANTS[name].method]
    if name not in METHODS:
        known = [*METHODS, *VARIANTS]
        raise UserError(f'method: "{name}" is unknown{did_you_mean(name, known)}; known: {", ".join(known)}')
    return METHODS[name]


def title_of(name: str) -> str:
    """How tables call a method or a variant."""
    return VARIANTS[name].title if name in VARIANTS else get_method(name).title


def configured(config: RunConfig, name: str) -> RunConfig:
    """The settings with a method's name in place, and with what makes a variant of it.

    Raises:
        UserError: No such method.
    """
    get_method(name)
    own = VARIANTS[name].settings if name in VARIANTS else {}
    return with_settings(config, {"method": name, **own})
