"""What the opponents share: padded batches, the plain training loop, the official server's mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from fedalt.config import TrainingConfig
from fedalt.data.encode import Example
from fedalt.names import Key, Tensors

IGNORED = -100
MULTIPLE = 8
"""The official collator pads to a multiple of 8."""


class Collator:
    """Pads a batch to its longest row, rounded up to a multiple of 8; prompts and padding are not supervised.

    On the right, where the official code pads left: the same amount of work, and models with learned positions then see
    the positions that fedalt shows them.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        """Ids, mask and labels of some rows."""
        width = -(-max(map(len, rows)) // MULTIPLE) * MULTIPLE
        ids = torch.full((len(rows), width), self.pad)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED)
        for n, row in enumerate(rows):
            ids[n, : len(row)] = torch.tensor(row.prompt + row.answer)
            mask[n, : len(row)] = 1
            labels[n, len(row.prompt) : len(row)] = torch.tensor(row.answer)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Optimizer:
    """``torch.optim.AdamW`` with gradient clipping and the learning rate falling linearly to 0."""

    def __init__(self, parameters: Sequence[nn.Parameter], steps: int, config: TrainingConfig) -> None:
        self.parameters = parameters
        self.limit = config.max_grad_norm
        self.adamw = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adamw, lambda step: max(0.0, 1 - step / steps))

    def step(self, loss: Tensor) -> None:
        """Backward, clip, step."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.limit)
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad()


def own_loss(base: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's own loss, over the logits of all positions."""
    loss: Tensor = base(**batch, use_cache=False).loss
    return loss


def answer_loss(base: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The same number from the logits of answer positions alone."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = base.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]  # [n, t - 1, d]
    labels = batch["labels"][:, 1:]
    answer = labels != IGNORED
    return F.cross_entropy(base.get_output_embeddings()(hidden[answer]).float(), labels[answer])


def train(
    base: Any,
    parameters: Sequence[nn.Parameter],
    batches: Iterable[Mapping[str, Tensor]],
    steps: int,
    config: TrainingConfig,
    loss_of: Callable[[Any, Mapping[str, Tensor]], Tensor] = own_loss,
) -> float:
    """The plain loop; the mean loss of its steps."""
    optimizer = Optimizer(parameters, steps, config)
    device = next(base.parameters()).device
    losses = []
    for batch in batches:
        loss = loss_of(base, {name: value.to(device) for name, value in batch.items()})
        optimizer.step(loss)
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def others_mean(uploads: Sequence[Tensors], client: int) -> dict[Key, Tensor]:
    """The official server: stack everybody else's tensor, take the mean, tensor by tensor."""
    return {
        key: torch.stack([upload[key] for k, upload in enumerate(uploads) if k != client]).mean(0)
        for key in uploads[client]
    }


def silence(base: nn.Module) -> None:
    """Take the base's own dropout out, for libraries that put the whole model into training mode."""
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
