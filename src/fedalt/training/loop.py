"""Local training of a cohort: the adapters on the model take each client's own steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import pi

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedalt.config import TrainingConfig
from fedalt.data.batches import Plan, cohort_steps
from fedalt.data.encode import Input, laid_out
from fedalt.model.adapted import AdaptedModel
from fedalt.model.batch_layout import BatchLayout, MixerProbe
from fedalt.names import Key
from fedalt.training.loss import step_losses
from fedalt.training.optimizer import PLAIN, Rule, Stacked, optimizer_of
from fedalt.training.privacy import private_losses


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
    def of(cls, *seen: tuple[MixerProbe, BatchLayout]) -> MixerWeights:
        """What probes saw while some rows were read."""
        layers = {
            path: torch.cat([probe.weights[path].float().cpu() for probe, _ in seen]) for path in seen[0][0].weights
        }
        owners = [torch.arange(len(r.sizes)).repeat_interleave(torch.tensor(r.client_tokens)) for _, r in seen]
        return cls(layers, torch.cat(owners))

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
    return MixerWeights.of((probe, rows))


OnStep = Callable[[int, int], None]
"""Called after every step of a cohort with (steps done, steps in all)."""


@dataclass(frozen=True)
class TrainingStats:
    """What local training of one client did.

    Attributes:
        loss: Mean over the client's steps of its mean cross-entropy per answer token, in nats.
        tokens: Tokens read, prompts included.
        alpha: Mean mixer weight of the first slot in every layer, over the tokens of the last step; empty if unmixed.
        epsilon: ε that the client has spent in all rounds so far, where steps are private.
    """

    loss: float
    steps: int
    tokens: int
    alpha: tuple[float, ...] = ()
    epsilon: float | None = None

    def following(self, earlier: TrainingStats) -> TrainingStats:
        """This phase's loss and mixer weights, and the steps and tokens of both."""
        return replace(self, steps=self.steps + earlier.steps, tokens=self.tokens + earlier.tokens)


def train(
    model: AdaptedModel,
    plans: Sequence[Plan],
    config: TrainingConfig,
    on_step: OnStep = lambda done, total: None,
    *,
    rule: Rule = PLAIN,
    optimizer: Stacked | None = None,
    turn: Turn = (1, 1),
) -> list[TrainingStats]:
    """Train every client on the model for the steps of its plan; clients with fewer steps stop earlier, untouched.

    By default, the learning rate of a client falls linearly from ``lr`` to 0 over its own steps, as with the Hugging
    Face Trainer that the official code starts anew every round. ``optimizer`` is of what ``moved`` says.
    """
    optimizer = optimizer or optimizer_of(config, list(moved(model, rule).values()))
    lengths = torch.tensor([len(plan.steps) for plan in plans], device=model.device)
    totals = torch.zeros(len(plans), device=model.device)
    steps, alphas = int(lengths.max()), dict[int, tuple[float, ...]]()
    private = plans[0].noise is not None
    model.train()
    for step, parts in enumerate(cohort_steps(plans, config.batch_size)):
        last = not private and any(len(plan.steps) == step + 1 for plan in plans)
        probes = [MixerProbe() if last else None for _ in parts]
        losses = partial(step_losses, model, parts, probes)
        if private:
            losses = partial(private_losses, model, parts, plans, step)
        totals += rule(losses, model.trainable, optimizer, learning_rates(config, step, lengths, turn), step < lengths)
        seen = [(probe, part.rows) for probe, part in zip(probes, parts, strict=True) if probe and probe.weights]
        if seen:
            weights = MixerWeights.of(*seen).means(0, len(plans))
            alphas |= {k: tuple(weights[k]) for k, plan in enumerate(plans) if len(plan.steps) == step + 1}
        on_step(step + 1, steps)
    model.train(False)
    means = (totals / lengths).tolist()
    return [
        TrainingStats(loss, len(plan.steps), plan.tokens, alphas.get(k, ()))
        for k, (loss, plan) in enumerate(zip(means, plans, strict=True))
    ]


def moved(model: AdaptedModel, rule: Rule) -> dict[Key, nn.Parameter]:
    """What the optimiser moves of what trains."""
    return {key: parameter for key, parameter in model.trainable.items() if rule.by_optimizer(key)}


Turn = tuple[int, int]
"""A round, from 1, and how many rounds share one schedule of the learning rate."""


def learning_rates(
    config: TrainingConfig, step: int, lengths: Int[Tensor, " k"], turn: Turn = (1, 1)
) -> Float[Tensor, " k"]:
    """Each client's learning rate at its own step, counted from 0, by the rules of ``transformers.get_scheduler``.

    ``lengths`` are the steps of every client in each round; a client that was absent goes on where it would be.
    """
    now, total = (turn[0] - 1) * lengths + step, turn[1] * lengths
    share = 0 < config.warmup < 1
    warm = (total.double() * config.warmup).ceil() if share else torch.full_like(total, int(config.warmup)).double()
    left, past = (total - warm).clamp(min=1), now - warm
    falls = {
        "linear": (1 - left.float().reciprocal() * past.float()).clamp(min=0),  # rounded as runs always were
        "cosine": (1 + (pi * (past / left).clamp(max=1)).cos()) / 2,
        "constant": torch.ones_like(past),
    }
    return config.lr * torch.where(now < warm, now / warm.clamp(min=1), falls[config.schedule]).float()
