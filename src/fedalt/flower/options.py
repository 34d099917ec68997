"""Settings of a run across sites."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedalt.section import Section


class FlowerConfig(Section):
    """What only a run on Flower has; on one machine none of it matters."""

    wire: Literal["fp32", "bf16", "int8"] = Field(
        "fp32", description="numbers on the wire: exact, halved, or a byte each with a scale per row"
    )
    min_sites: int = Field(2, ge=1, description="fewest sites to start with, and fewest uploads that make a round")
    round_deadline: float = Field(
        3600, gt=0, description="seconds after which a round goes on without the sites that have not answered"
    )
    norm_limit: float = Field(
        100, gt=1, description="an upload longer than this many times the median of its round is set aside"
    )
    allow_two: bool = Field(
        False, description="let a client be told what is made of one other's upload alone, as always with two clients"
    )
    client_gpus: float = Field(
        0, ge=0, description="GPUs that a site of a simulation has (Ray's num_gpus; .5: two share one); 0 for the CPU"
    )
