"""The loss of a cohort: every client's own mean over its own answer tokens, and no logits elsewhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from jaxtyping import Float
from torch import Tensor, nn

from fedalt.data.batches import Batch
from fedalt.model.adapted import AdaptedModel


def client_losses(model: AdaptedModel, batch: Batch) -> Float[Tensor, " k"]:
    """Mean cross-entropy of each client's answer tokens; 0 for a client without rows in the batch.

    The sum over clients is what is differentiated, so each client gets exactly the gradient of training alone.
    (The loss built into Hugging Face models averages over all tokens of a batch and would let long rows of one
    client shrink the steps of another.)
    """
    clients = len(batch.rows.sizes)
    logits = supervised_logits(model, batch)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits, batch.target, reduction="none")
    counts = torch.bincount(batch.owner, minlength=clients).clamp(min=1)
    return torch.zeros(clients, device=losses.device, dtype=losses.dtype).index_add(0, batch.owner, losses) / counts


def supervised_logits(model: AdaptedModel, batch: Batch) -> Float[Tensor, "s vocab"]:
    """Logits at supervised positions only.

    The head's input is gathered on its way in, so the model's own forward runs, soft-capping and scaling of logits
    included, and logits of unsupervised positions never exist.
    """
    head: nn.Module = model.base.get_output_embeddings()

    def gather(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        return (inputs[0][batch.row, batch.column][None],)  # [n, t, d] -> [1, s, d]

    handle = head.register_forward_pre_hook(gather)
    try:
        with model.rows(batch.rows):
            out = model.base(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        handle.remove()
    logits: Tensor = out.logits[0]
    return logits
