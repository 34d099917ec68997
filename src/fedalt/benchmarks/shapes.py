"""The base model: random weights of a known shape, the shipped one, or a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedalt.benchmarks.rows import HashTokenizer
from fedalt.benchmarks.task import Spec, choose
from fedalt.config import ModelConfig
from fedalt.model.base import TINY_BASE, load_base, resolve_device, resolve_source

TINY = "tiny"
_IDS: dict[str, Any] = {
    "pad_token_id": HashTokenizer.pad_token_id,
    "eos_token_id": HashTokenizer.eos_token_id,
    "bos_token_id": None,
}


def _llama(hidden: int, layers: int, heads: int, inner: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=2048,
        **_IDS,
    )


def _bloom(hidden: int, layers: int, heads: int) -> Any:
    from transformers import BloomConfig

    return BloomConfig(vocab_size=250_880, hidden_size=hidden, n_layer=layers, n_head=heads, **_IDS)


def _gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_IDS)


SHAPES: dict[str, Callable[[], Any]] = {
    "llama-25m": lambda: _llama(512, 8, 8, 1376),  # 25 M in the blocks, 33 M in embedding and head
    "llama-7b": lambda: _llama(4096, 32, 32, 11_008),
    "bloom-560m": lambda: _bloom(1024, 24, 16),
    "gpt2-small": _gpt2,
}
"""Name → configuration; nothing is downloaded."""


def load(spec: Spec) -> tuple[Any, Any]:
    """The frozen base in eval mode, and its tokenizer.

    Raises:
        UserError: Neither a shape nor a model folder.
    """
    if spec.model in SHAPES:
        base = build(spec.model, spec.dtype, spec.seed, resolve_device("auto"))
        return base, HashTokenizer(base.config.vocab_size)
    loaded = load_base(ModelConfig(name=source(spec.model), dtype=spec.dtype))
    return loaded.model, loaded.tokenizer


def skeleton(spec: Spec) -> Any:
    """The base without weights, for the sizes of its layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if spec.model in SHAPES:
        return build(spec.model, spec.dtype, spec.seed, "meta")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(resolve_source(source(spec.model))))


def build(shape: str, dtype: str, seed: int, device: str) -> Any:
    """Random weights by seed."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=getattr(torch, dtype))
    return model.eval().requires_grad_(False)


def check(model: str) -> None:
    """Complain before anything is started.

    Raises:
        UserError: Neither a shape nor a model folder.
    """
    if model not in SHAPES:
        source(model)


def source(model: str) -> str:
    """What ``model.name`` is called for a model that is no shape.

    Raises:
        UserError: Neither a shape nor a model folder; hub names are not taken, so that nothing is fetched.
    """
    if model == TINY or Path(model).expanduser().is_dir():
        return TINY_BASE if model == TINY else model
    return choose("--model", model, [TINY, *SHAPES, "a model folder"])
