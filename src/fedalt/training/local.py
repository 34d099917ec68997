"""Local training of a cohort: the adapters on the model take each client's own steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from fedalt.config import TrainingConfig
from fedalt.data.batches import Plan, cohort_steps
from fedalt.model.adapted import AdaptedModel
from fedalt.model.rowmap import MixerProbe
from fedalt.training.loss import client_losses
from fedalt.training.mixing import MixerWeights
from fedalt.training.optimizer import StackedAdamW
from fedalt.training.rules import PLAIN, Rule

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
