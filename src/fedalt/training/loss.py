"""The loss of a cohort: every client's own mean over its own answer tokens, and no logits elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedalt.data.batches import Batch
from fedalt.model.adapted import AdaptedModel
from fedalt.model.batch_layout import MixerProbe
from fedalt.model.targets import backbone_of
from fedalt.training.optimizer import columns

_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 24}
"""Logits at a time (16 MiB in fp32): on a CPU larger pieces cost fresh memory and gain nothing. A guess for GPUs."""
_TOKENS = 64
"""Tokens at a time at least, whatever the vocabulary: fewer would wait for the head's weights."""


def client_losses(
    model: AdaptedModel, batch: Batch, probe: MixerProbe | None = None, counts: Int[Tensor, " k"] | None = None
) -> Float[Tensor, " k"]:
    """Mean cross-entropy of each client's answer tokens, or rows' classes; 0 for a client without rows in the batch.

    The sum over clients is what is differentiated, so each client gets exactly the gradient of training alone.
    (The loss built into Hugging Face models averages over all tokens of a batch and would let long rows of one
    client shrink the steps of another.) ``counts`` are the targets of each client's step, where these are a part of it.
    """
    losses = class_losses(model, batch, probe) if model.heads else token_losses(model, batch, probe)
    clients = len(batch.rows.sizes)
    counts = target_counts(batch) if counts is None else counts
    total = torch.zeros(clients, device=losses.device, dtype=losses.dtype).index_add(0, batch.owner, losses)
    return total / counts.clamp(min=1)


def row_losses(model: AdaptedModel, batch: Batch, *, mean: bool = False) -> Float[Tensor, " n"]:
    """Nats of every row's answer, or of each of its tokens in the mean, or of its class."""
    if model.heads:
        return class_losses(model, batch)
    tokens = token_losses(model, batch)
    ends = torch.tensor(batch.rows.lengths, device=tokens.device).cumsum(0)
    row = torch.bucketize(batch.place.contiguous(), ends, right=True)
    total = tokens.new_zeros(len(ends)).index_add(0, row, tokens)
    return total / torch.bincount(row, minlength=len(ends)).clamp(min=1) if mean else total


def class_losses(model: AdaptedModel, batch: Batch, probe: MixerProbe | None = None) -> Float[Tensor, " n"]:
    """Cross-entropy of every row's class, in nats."""
    scores = model.class_scores(batch.inputs, batch.rows, probe)
    return torch.nn.functional.cross_entropy(scores, batch.target, reduction="none")


def target_counts(batch: Batch) -> Int[Tensor, " k"]:
    """What every client has to predict in a batch."""
    return torch.bincount(batch.owner, minlength=len(batch.rows.sizes))


def step_losses(
    model: AdaptedModel, parts: Sequence[Batch], probes: Sequence[MixerProbe | None]
) -> Float[Tensor, " k"]:
    """The losses of a step's parts as those of one batch; only one part's activations are in memory at a time."""
    if len(parts) == 1:
        return client_losses(model, parts[0].to(model.device), probes[0])
    counts = torch.stack([target_counts(part) for part in parts]).sum(0).to(model.device)
    losses = (
        partial(client_losses, model, part.to(model.device), probe, counts)
        for part, probe in zip(parts, probes, strict=True)
    )
    parameters = list(model.trainable.values())
    values, grads = part_gradients(losses, parameters)
    total: Tensor = Given.apply(values, grads, *parameters)  # type: ignore[no-untyped-call]
    return total


def part_gradients(
    losses: Iterable[Callable[[], Float[Tensor, " k"]]], parameters: Sequence[Tensor]
) -> tuple[Float[Tensor, " k"], list[Tensor | None]]:
    """The sum of several losses and, where somebody will ask for them, its gradients, found part by part."""
    needed, values = torch.is_grad_enabled() and bool(parameters), list[Tensor]()
    grads: list[Tensor | None] = [None] * len(parameters)
    for loss in losses:
        value = loss()
        values.append(value.detach())
        if needed:
            found = torch.autograd.grad(value.sum(), parameters, allow_unused=True)
            grads = [
                new if old is None else old if new is None else old + new for old, new in zip(grads, found, strict=True)
            ]
    return torch.stack(values).sum(0), grads


class Given(torch.autograd.Function):
    """Losses ``[k]`` whose gradients are known already.

    Client i's loss depends on the i-th slice of every parameter ``[k, …]`` alone, so the gradients of all are kept as
    those of the sum over clients.
    """

    @staticmethod
    def forward(ctx: Any, values: Float[Tensor, " k"], grads: Sequence[Tensor | None], *parameters: Tensor) -> Tensor:
        """The losses."""
        ctx.save_for_backward(*grads)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, " k"]) -> tuple[Tensor | None, ...]:
        """Each client's slices by its own factor."""
        return None, None, *(None if kept is None else kept * columns(grad, kept) for kept in ctx.saved_tensors)


def token_losses(model: AdaptedModel, batch: Batch, probe: MixerProbe | None = None) -> Float[Tensor, " s"]:
    """Cross-entropy of every answer token."""
    out = model.hidden(batch.inputs, batch.rows, batch.place, probe)
    chunk = max(_TOKENS, _LOGITS[model.device.type] // model.base.config.get_text_config().vocab_size)
    head = partial(logits, model.base, out)
    losses: Tensor = TokenLosses.apply(out.last_hidden_state, batch.target, head, chunk)  # type: ignore[no-untyped-call]
    return losses


def logits(base: Any, out: Any, hidden: Float[Tensor, "s d"]) -> Float[Tensor, "s vocab"]:
    """What a causal LM makes of some final hidden states, by its own forward: head, scaling and soft-capping."""
    replaced = type(out)(last_hidden_state=hidden[None])
    backbone, ids = backbone_of(base), torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
    with patch.object(backbone, "forward", lambda *args, **kwargs: replaced):
        scores: Tensor = base(input_ids=ids).logits
    return scores.squeeze(0)  # an index would fill its gradient with zeros first


class TokenLosses(torch.autograd.Function):
    """Cross-entropy per token, ``log Σ exp(z) − z_target``, a chunk of the vocabulary-wide logits z at a time.

    The head is frozen, so the gradient to a token's hidden state is found while its logits exist (``softmax(z)`` less
    one at the target, through the head), and is all that is kept: memory does not grow with tokens times vocabulary.
    Where nobody will ask for that gradient the head is not gone through again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "s d"],
        target: Int[Tensor, " s"],
        head: Callable[[Float[Tensor, "c d"]], Float[Tensor, "c vocab"]],
        chunk: int,
    ) -> Float[Tensor, " s"]:
        """Losses in fp32 (fp64 for an fp64 model), ``chunk`` tokens at a time."""
        needed = ctx.needs_input_grad[0]
        losses, grads = [], []
        for states, targets in zip(hidden.detach().split(chunk), target.split(chunk), strict=True):
            with torch.set_grad_enabled(needed):
                scores = head(states.requires_grad_(needed))
                scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            z, at = scores.detach(), targets[:, None]
            top = z.amax(-1, keepdim=True)
            slope = (z - top).exp_()
            total = slope.sum(-1, keepdim=True)
            losses.append((total.log() + top - z.gather(1, at))[:, 0])
            if needed:
                slope.div_(total).scatter_add_(1, at, -torch.ones_like(total))
                grads += torch.autograd.grad(scores, states, slope)
        if needed:
            ctx.save_for_backward(torch.cat(grads))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, " s"]) -> tuple[Tensor, None, None, None]:
        """Every token's loss depends on its own hidden state only."""
        (grads,) = ctx.saved_tensors
        return grads * grad[:, None].to(grads.dtype), None, None, None
