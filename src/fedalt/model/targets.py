"""Which linear layers get adapters: an alias list by architecture, or names the user gives."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from fedalt.errors import UserError, did_you_mean

ALIASES = (
    ("q_proj", "v_proj"),  # Llama, Qwen, Mistral, Gemma, OPT, ViT since transformers 5
    ("query_key_value",),  # Bloom, GPT-NeoX, Falcon: one fused layer
    ("c_attn",),  # GPT-2: one fused Conv1D
    ("qkv_proj",),  # Phi-3: one fused layer
    ("query", "value"),  # BERT family
    ("q_lin", "v_lin"),  # DistilBERT
    ("query_proj", "value_proj"),  # DeBERTa-v2
    ("q_b_proj", "kv_b_proj"),  # DeepSeek-V2 and V3
    ("q_proj", "kv_b_proj"),  # the same without a low-rank query
    ("Wqkv",),  # MPT, DBRX, ModernBERT: one fused layer
    ("in_proj", "x_proj"),  # Mamba, whose other layers are read past their forward
    ("in_proj",),  # Mamba 2, likewise
)
"""Attention projections, by name; the first set of which every name occurs in the model is taken."""
_CROSS = re.compile(r"(^|\.)(encoder_attn|crossattention|cross_attn|EncDecAttention)(\.|$)")
"""Attention to an encoder, which a decoder alone does not run."""
ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the output head. Classification heads, too, are no targets: each client trains
its own in full, and they have left the model when targets are looked for."""


def find_targets(model: Any, names: Sequence[str] | None = None) -> tuple[str, ...]:
    """Full paths of the layers to adapt, in model order.

    ``names`` are last parts of module paths (``q_proj``) or full paths, or ``all-linear`` alone; None looks the
    architecture up.
    """
    backbone = backbone_of(model)
    stem = next(f"{path}." for path, module in model.named_modules() if module is backbone)
    linear = [stem + path for path, module in backbone.named_modules() if is_linear(module) and not _CROSS.search(path)]
    if names is not None and ALL_LINEAR in names:
        if len(names) > 1:
            raise UserError(f"lora.targets: {ALL_LINEAR} means every layer; leave the other names out")
        return tuple(linear)
    endings = Counter(path.rsplit(".", 1)[-1] for path in linear)
    if names is None:
        names = next((alias for alias in ALIASES if all(name in endings for name in alias)), None)
        if names is None:
            kind = type(model).__name__
            raise UserError(
                f"lora.targets: {kind} is not in the alias list; give {ALL_LINEAR}, or {_candidates(endings)}"
            )
    for name in names:
        if not any(_matches(path, name) for path in linear):
            hint = did_you_mean(name, [*endings, ALL_LINEAR])
            raise UserError(f'lora.targets: "{name}" matches no linear layer{hint}; {_candidates(endings)}')
    return tuple(path for path in linear if any(_matches(path, name) for name in names))


def backbone_of(model: Any) -> Any:
    """The part that turns tokens, or an image, into states: the text decoder, without vision tower and output head."""
    from transformers import PreTrainedModel

    found = model.get_decoder()
    if isinstance(found, PreTrainedModel) and found is not model:
        return found
    return next(module for module in model.children() if isinstance(module, PreTrainedModel))


def narrowed(paths: Sequence[str], layers: Sequence[int] | None = None, exclude: Sequence[str] = ()) -> tuple[str, ...]:
    """The targets in some blocks, without those that are excluded by the last part of their path or by all of it."""
    blocks = {path: next((int(part) for part in path.split(".") if part.isdecimal()), None) for path in paths}
    known = {block for block in blocks.values() if block is not None}
    for block in layers or ():
        if block not in known:
            there = f"blocks 0 to {max(known)} have targets" if known else "no target is in a numbered block"
            raise UserError(f"lora.layers: no block {block}; {there}")
    for name in exclude:
        if not any(_matches(path, name) for path in paths):
            hint = did_you_mean(name, {path.rsplit(".", 1)[-1] for path in paths})
            raise UserError(f'lora.exclude: "{name}" is none of the targets{hint}')
    kept = [path for path in paths if layers is None or blocks[path] in layers]
    kept = [path for path in kept if not any(_matches(path, name) for name in exclude)]
    if not kept:
        raise UserError("lora.exclude: no target is left")
    return tuple(kept)


def is_linear(module: nn.Module) -> bool:
    """Whether adapters can stand beside this module: ``nn.Linear`` and its quantised kin, GPT-2's ``Conv1D``."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _matches(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _candidates(endings: Counter[str]) -> str:
    return "linear layers here: " + ", ".join(f"{name} ({count})" for name, count in endings.items())
