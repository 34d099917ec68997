"""Local training of a cohort: the adapters on the model take each client's own steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedalt.config import TrainingConfig
from fedalt.data.batches import Plan, cohort_steps
from fedalt.data.encode import Input, laid_out
from fedalt.model.adapted import AdaptedModel
from fedalt.model.batch_layout import BatchLayout, MixerProbe
from fedalt.training.loss import client_losses
from fedalt.training.optimizer import PLAIN, Rule, StackedAdamW


@dataclass(frozen=True)
class MixerWeights:
    """Mixer weights of a cohort's prompts, one after another.

    Attributes:
        layers: Layer path → α ``[t, m]``, in the order of the slots.
        owners: Stack index of the client of every token.
    """

    layers: dict[str, Float[Tensor, "t m"]]
    owners: Int[Tensor, " t"]

    @classmethod
    def of(cls, probe: MixerProbe, rows: BatchLayout) -> MixerWeights:
        """What a probe saw while these rows were read."""
        layers = {path: alpha.float().cpu() for path, alpha in probe.weights.items()}
        return cls(layers, torch.repeat_interleave(torch.arange(len(rows.sizes)), torch.tensor(rows.client_tokens)))

    def means(self, slot: int, clients: int) -> list[list[float]]:
        """Mean weight of one slot per client (outer) and layer (inner), over tokens."""
        tokens = torch.bincount(self.owners, minlength=clients)
        columns = [
            torch.zeros(clients).index_add(0, self.owners, alpha[:, slot]) / tokens for alpha in self.layers.values()
        ]
        means: list[list[float]] = torch.stack(columns, 1).tolist()
        return means


@torch.no_grad()
def mixer_weights(model: AdaptedModel, inputs: Sequence[Sequence[Input]]) -> MixerWeights:
    """Read the mixers of the clients on the model while they look at some texts or images of each."""
    flat = [value for mine in inputs for value in mine]
    rows = BatchLayout(tuple(map(len, inputs)), tuple(map(len, flat)))
    probe = MixerProbe()
    model.hidden(laid_out(flat).to(model.device), rows, probe=probe)
    return MixerWeights.of(probe, rows)


OnStep = Callable[[int, int], None]
"""Called after every step of a cohort with (steps done, steps in all)."""


@dataclass(frozen=True)
class TrainingStats:
    """What local training of one client did.

    Attributes:
        loss: Mean over the client's steps of its mean cross-entropy per answer token, in nats.
        steps: Optimiser steps.
        tokens: Tokens read, prompts included.
        alpha: Mean mixer weight of the first slot in every layer, over the tokens of the last step; empty if unmixed.
    """

    loss: float
    steps: int
    tokens: int
    alpha: tuple[float, ...] = ()

    def following(self, earlier: TrainingStats) -> TrainingStats:
        """This phase's loss and mixer weights, and the steps and tokens of both."""
        return replace(self, steps=self.steps + earlier.steps, tokens=self.tokens + earlier.tokens)


def train(
    model: AdaptedModel,
    plans: Sequence[Plan],
    config: TrainingConfig,
    on_step: OnStep = lambda done, total: None,
    rule: Rule = PLAIN,
) -> list[TrainingStats]:
    """Train every client on the model for the steps of its plan; clients with fewer steps stop earlier, untouched.

    The learning rate of a client falls linearly from ``lr`` to 0 over its own steps, as with the Hugging Face
    Trainer that the official code starts anew every round.
    """
    moved = [parameter for key, parameter in model.trainable.items() if rule.by_optimizer(key)]
    optimizer = StackedAdamW(moved, config.weight_decay, config.max_grad_norm)
    lengths = torch.tensor([len(plan.steps) for plan in plans], device=model.device)
    totals = torch.zeros(len(plans), device=model.device)
    steps, alphas = int(lengths.max()), dict[int, tuple[float, ...]]()
    model.train()
    for step, batch in enumerate(cohort_steps(plans)):
        probe = MixerProbe() if any(len(plan.steps) == step + 1 for plan in plans) else None
        losses = partial(client_losses, model, batch.to(model.device), probe)
        totals += rule(losses, model.trainable, optimizer, learning_rates(config, step, lengths), step < lengths)
        if probe and probe.weights:
            weights = MixerWeights.of(probe, batch.rows).means(0, len(plans))
            alphas |= {k: tuple(weights[k]) for k, plan in enumerate(plans) if len(plan.steps) == step + 1}
        on_step(step + 1, steps)
    model.train(False)
    means = (totals / lengths).tolist()
    return [
        TrainingStats(loss, len(plan.steps), _tokens(plan), alphas.get(k, ()))
        for k, (loss, plan) in enumerate(zip(means, plans, strict=True))
    ]


def learning_rates(config: TrainingConfig, step: int, lengths: torch.Tensor) -> torch.Tensor:
    """Each client's learning rate at its own step."""
    decay = (1 - step / lengths).clamp(min=0) if config.schedule == "linear" else torch.ones(len(lengths))
    return config.lr * decay.to(lengths.device)


def _tokens(plan: Plan) -> int:
    return sum(len(example) for rows in plan.steps for example in rows)
