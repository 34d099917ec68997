"""Free memory, and what a cache takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from fedalt.model import offload
from fedalt.model.base import cache_bytes
from fedalt.model.offload import free_memory
from support import MODELS, SMALL, VOCAB, opt


def test_what_is_free_is_what_the_system_can_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload.psutil, "virtual_memory", lambda: SimpleNamespace(available=123, free=5))
    assert free_memory(torch.device("cpu")) == 123


def test_memory_that_torch_holds_on_a_gpu_without_using_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("mem_get_info", (700, 900)), ("memory_reserved", 50), ("memory_allocated", 30)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_memory(torch.device("cuda", 0)) == 720


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [*MODELS.values(), opt])
@torch.no_grad()
def test_a_cache_takes_what_is_foretold(make: Any, dtype: torch.dtype) -> None:
    model = make().to(dtype)
    layers = model(torch.arange(3, 24).view(3, 7), use_cache=True).past_key_values.layers
    taken = sum(part.numel() * part.element_size() for layer in layers for part in (layer.keys, layer.values))
    assert taken == 21 * cache_bytes(model)


def test_a_model_without_attention_has_no_such_cache() -> None:
    config = MambaConfig(vocab_size=VOCAB, hidden_size=SMALL["hidden_size"], num_hidden_layers=1, state_size=4)
    assert cache_bytes(MambaForCausalLM(config)) == 0
