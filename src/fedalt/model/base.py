"""Loading the frozen base model and its tokenizer, by folder or hub name, and fingerprinting it."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedalt.config import ModelConfig
from fedalt.errors import UserError

TINY_BASE = "tiny-base"
_SAMPLES = 65_536


@dataclass(frozen=True)
class Base:
    """A frozen causal LM, its tokenizer, and what identifies it.

    Attributes:
        model: The causal LM, in eval mode.
        tokenizer: Its tokenizer, with a pad token.
        source: Folder or hub name that ``from_pretrained`` finds.
        sha256: Fingerprint of the weights.
    """

    model: Any
    tokenizer: Any
    source: str
    sha256: str


def load_base(config: ModelConfig) -> Base:
    """Load a causal LM from safetensors and freeze it.

    Raises:
        UserError: Not a model folder, not on the hub, no causal LM, no tokenizer, or bitsandbytes is missing.
    """
    from transformers import AutoModelForCausalLM

    source = resolve_source(config.name)
    device = resolve_device(config.device)
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype), "use_safetensors": True}
    if config.load_in:
        options |= {"quantization_config": quantization(config.load_in), "device_map": {"": device}}
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(source, **options, output_loading_info=True)
    except Exception as error:  # whatever a broken folder makes the libraries raise
        raise UserError(f"model.name: {config.name} is not a causal LM that can be loaded ({_first(error)})") from None
    model, loaded = opened
    if loaded["missing_keys"]:
        first = min(loaded["missing_keys"])
        raise UserError(f"model.name: {config.name} is no causal LM that can be loaded (no weights for {first})")
    if not config.load_in:
        model.to(device)
    keep_trainable_through(model)
    return Base(model.eval(), load_tokenizer(source), source, fingerprint(model))


def load_tokenizer(source: str) -> Any:
    """Load the tokenizer of a model; a missing pad token becomes the end-of-sequence token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # whatever a broken folder makes the libraries raise
        raise UserError(f"model.name: {source} has no tokenizer that can be loaded ({_first(error)})") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.name: the tokenizer of {source} has no end-of-sequence token, so answers never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def positions(model: Any) -> int | None:
    """How many positions the model has; nothing for one that has no limit (Bloom)."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return int(limit) if limit else None


def resolve_source(name: str) -> str:
    """Folder or hub name behind ``model.name``: tiny-base is in the package, a path must hold a config.json."""
    if name == TINY_BASE:
        return str(resources.files("fedalt") / "assets" / "tiny_base")
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model.name: {name} is a folder, but no model folder: it has no config.json")
        return str(path.resolve())
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model.name: {name} is no folder; give a model folder, a hub name, or {TINY_BASE}")
    return name


def resolve_device(name: str) -> str:
    """``auto`` is a GPU where there is one."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"model.device: {name} is not available on this machine; use cpu or auto")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def quantization(bits: str) -> Any:
    """The bitsandbytes configuration of the paper's code for 8 bit, NF4 for 4 bit."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"model.load_in: {bits} needs bitsandbytes; install it with: pip install 'fedalt[quantized]'")
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def keep_trainable_through(model: nn.Module) -> None:
    """Stop 4-bit layers on AVX512-BF16 CPUs from repacking their weights into a form that has no gradient."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - no attribute of nn.Module


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and up to 65,536 evenly spaced elements of every weight.

    Sampling keeps a 7B model at a fraction of a second; fine-tuned weights differ everywhere, so they are told apart.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.state_dict().items()):
        if not isinstance(parameter, torch.Tensor):
            continue
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].contiguous().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
    return digest.hexdigest()


def _first(error: Exception) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0].rstrip(".")
