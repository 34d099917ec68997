"""Settings of single methods: a section each, read by that method alone."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedalt.section import Section


class FedALTConfig(Section):
    """FedALT, its ablations, and rows beyond the paper."""

    row_aggregator: Literal["factor_mean", "stack", "svd", "fair", "median", "trimmed_mean", "krum"] = Field(
        "factor_mean",
        description="the row of a client from the others' uploads: means of A and of B (paper), the exact mean of "
        "products, its best approximation of rank row_rank, factor_mean with B fitted to it, or a robust rule",
    )
    row_rank: int | None = Field(None, ge=1, description="rank of svd rows; lora.r when not given")
    ridge: float = Field(0.01, ge=0, description="fair: weight of the size of the correction")
    trim: float = Field(0.2, ge=0, lt=0.5, description="trimmed_mean: share of values dropped at each end")
    byzantine: int = Field(1, ge=0, description="krum: clients that may be faulty")
    clusters: int = Field(1, ge=1, description="rows per client, one for each group of similar clients (paper: 1)")
    row_from: Literal["others", "all"] = Field("others", description="all: own LoRA included (ablation Global-avg)")
    row_update: Literal["frozen", "discard", "average_rows"] = Field(
        "frozen",
        description="frozen (paper); or trained and thrown away, or trained and averaged (ablation RoW-Update)",
    )
    halved: bool = Field(
        False, description="both LoRAs have half of lora.r, at the same scale (ablation RoW-Update r4)"
    )
    mixing: Literal["mixer", "half", "one_over_k"] = Field(
        "mixer", description="per-token mixer (paper), or fixed weight of the individual LoRA: 1/2 or 1/K (ablations)"
    )
    full_start: bool = Field(
        False, description="scale times the number of LoRAs, so that even weights leave the individual one at alpha/r"
    )
    mixer_average: bool = Field(False, description="average mixers over clients in every round (ablation)")


class FedITSplitConfig(Section):
    """FedIT with several small LoRAs in place of one."""

    parts: int = Field(2, ge=2, description="LoRAs, each of rank lora.r / parts")
    router: Literal["none", "mean", "softmax"] = Field("softmax", description="weights: 1, 1/parts, or per token")
    router_average: bool = Field(True, description="average the router like the LoRAs, or keep it at the client")
    scaling: Literal["rank", "part"] = Field("rank", description="scale alpha over lora.r, or over each part's rank")


class FedDPAConfig(Section):
    """FedDPA-F and FedDPA-T."""

    local_weight: float = Field(0.5, ge=0, le=1, description="weight of the local LoRA while it trains (FedDPA-T)")
    samples: int = Field(5, ge=1, description="training rows that a prompt is compared with")
    most: float = Field(0.5, ge=0, le=1, description="largest weight that similarity gives")
    weight_target: Literal["local", "global"] = Field(
        "local", description="LoRA whose weight grows with similarity (official code: global)"
    )
    embed_with: Literal["local", "global", "base"] = Field(
        "local", description="adapters under which rows are compared"
    )


class PF2LoRAConfig(Section):
    """PF2LoRA."""

    private_rank: int | None = Field(
        None, ge=1, description="rank of the private LoRA; lora.r / 4, rounded up, when not given"
    )
    private_lr: float | None = Field(
        None,
        gt=0,
        description="SGD step of the private LoRA; 100 times training.lr if not given: AdamW's steps are not SGD's",
    )
    hypergrad: Literal["first_order", "unrolled"] = Field(
        "first_order", description="whether the common LoRA's gradient looks through the private LoRA's step"
    )
    private_scale: Literal["same", "own_rank"] = Field("same", description="alpha over lora.r, or over private_rank")


class FDLoRAConfig(Section):
    """FDLoRA."""

    outer_lr: float = Field(0.7, gt=0, description="server's learning rate on the mean change (DiLoCo: .7)")
    outer_momentum: float = Field(0.9, ge=0, lt=1, description="Nesterov momentum of the server (DiLoCo: .9)")
    sync_every: int = Field(5, ge=1, description="rounds after which the personal LoRA becomes the client's shared one")
    few_shot: int = Field(16, ge=1, description="rows of a client on which the fusion weights are found")
    budget: int = Field(40, ge=9, description="evaluations of the fusion weights")
    penalty: float = Field(0.05, ge=0, description="weight of (|w1| + |w2|)/2 beside the loss")


class HetLoRAConfig(Section):
    """HetLoRA."""

    tail: float = Field(0.99, gt=0, le=1, description="share of the rank before the tail that may be pruned")
    decay: float = Field(5e-3, ge=0, description="weight of the tail's norm in the loss")
    prune: bool = Field(True, description="drop a tail that has become smaller than it was received")


class LoRAFairConfig(Section):
    """LoRA-FAIR."""

    solver: Literal["sgd", "ridge"] = Field("sgd", description="cosine by gradient descent (paper), or least squares")
    weight: float = Field(0.01, ge=0, description="weight of the correction's size")
    lr: float = Field(0.01, gt=0, description="sgd: learning rate")
    steps: int = Field(1000, ge=1, description="sgd: steps")
