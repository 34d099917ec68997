"""What is free on a device, and what a token of an answer takes of it."""

from __future__ import annotations

from typing import Any

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on a GPU also what torch has taken there and does not use."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return int(psutil.virtual_memory().available)


def cache_bytes(base: Any) -> int:
    """Bytes of one token's keys and values in all layers; 0 for a model that has none."""
    config = base.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * config.num_hidden_layers * groups * width * base.dtype.itemsize)
