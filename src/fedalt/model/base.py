"""Loading the frozen base model and its tokenizer or image processor, by folder or hub name, and fingerprinting it."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedalt.config import ModelConfig
from fedalt.errors import UserError, first_line
from fedalt.model.classifier import head_paths
from fedalt.model.offload import held, spread
from fedalt.model.peft_files import read_adapter_config
from fedalt.model.source import resolve_source


def cache_bytes(base: Any) -> int:
    """Bytes of one token's keys and values in all layers; 0 for a model that has none."""
    config = base.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * config.num_hidden_layers * groups * width * base.dtype.itemsize)


_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
}
_KINDS = {
    "causal_lm": "a causal LM",
    "sequence_classification": "a text classifier",
    "image_classification": "an image classifier",
}
OWN_CODE: dict[str, Any] = {"trust_remote_code": False}
"""A model's own code is never run, and nobody is asked whether it may be."""
_SAMPLES = 65_536


@dataclass(frozen=True)
class Base:
    """A frozen model, its tokenizer or image processor, and what identifies it.

    Attributes:
        model: A causal LM or a classifier, in eval mode.
        tokenizer: Its tokenizer, with a pad token; or its image processor.
        source: Folder or hub name that ``from_pretrained`` finds.
        sha256: Fingerprint of the frozen weights.
        heads: Paths of the modules that are no part of it, since every client trains its own: classification heads.
        new: Paths of the heads that the checkpoint holds no weights for.
    """

    model: Any
    tokenizer: Any
    source: str
    sha256: str
    heads: tuple[str, ...] = ()
    new: tuple[str, ...] = ()


def load_base(config: ModelConfig) -> Base:
    """Load a causal LM, or a classifier of ``config.labels``, from safetensors."""
    import transformers

    source = resolve_source(config.name)
    device = resolve_device(config.device)
    kind = _KINDS[config.task]
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype), "use_safetensors": True, **OWN_CODE}
    if config.labels is not None:
        names = dict(enumerate(config.labels))
        options |= {"id2label": names, "label2id": {name: i for i, name in names.items()}}
        options["ignore_mismatched_sizes"] = True
    if config.load_in:
        options |= {
            "quantization_config": quantization(config.load_in, config.labels is not None),
            "device_map": {"": device},
        }
    if config.device_map:
        options |= spread(config, torch.device(device))
    try:
        auto = getattr(transformers, _CLASSES[config.task])
        opened: Any = auto.from_pretrained(source, **options, output_loading_info=True)
    except Exception as error:  # whatever a broken folder makes the libraries raise
        raise UserError(f"model.name: {config.name} is not {kind} that can be loaded ({first_line(error)})") from None
    model, loaded = opened
    _check_quantized(model, config)
    missing = {*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}
    heads = head_paths(model, missing) if config.labels is not None else ()
    lacking = sorted(key for key in missing if not _inside(key, heads))
    if lacking:
        raise UserError(f"model.name: {config.name} is not {kind} that can be loaded (no weights for {lacking[0]})")
    if config.adapter and config.adapter_as == "merged":
        model = _with_adapter(model, config)
    broken = next((name for name, weight in model.named_parameters() if not _finite(held(model, name, weight))), None)
    if broken and not _inside(broken, heads):
        raise UserError(f"model.name: {config.name} has weights that are no numbers (NaN or infinite in {broken})")
    if not config.load_in and not config.device_map:
        model.to(device)
    keep_trainable_through(model)
    read = load_processor(source) if config.task == "image_classification" else load_tokenizer(source, not heads)
    if heads and getattr(read, "pad_token_id", None) is not None:
        model.config.get_text_config().pad_token_id = read.pad_token_id
    new = tuple(path for path in heads if any(_inside(key, (path,)) for key in missing))
    return Base(model.eval(), read, source, fingerprint(model, heads), heads, new)


def _check_quantized(model: Any, config: ModelConfig) -> None:
    """Refuse weights that are quantised in their folder in another way than ``model.load_in`` says."""
    said = getattr(model.config, "quantization_config", None)
    if said is None:
        return
    about = said if isinstance(said, dict) else said.to_dict()
    bits = next((bits for bits in ("4bit", "8bit") if about.get(f"load_in_{bits}")), None)
    if bits is None:
        kind = about.get("quant_method", "in a way of its own")
        raise UserError(f"model.name: {config.name} is quantised ({kind}), which is not trained on here")
    if bits != config.load_in:
        raise UserError(f"model.load_in: {config.name} is quantised to {bits} already; write model.load_in={bits}")


def _with_adapter(model: Any, config: ModelConfig) -> Any:
    """The model with ``model.adapter`` merged into its weights by PEFT."""
    from peft import PeftModel

    folder = Path(str(config.adapter))
    read_adapter_config(folder)
    if config.load_in:
        raise UserError(f"model.adapter: {config.load_in} weights cannot take a merge exactly; leave model.load_in out")
    try:
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except Exception as error:  # whatever an adapter of another model makes PEFT raise
        raise UserError(f"model.adapter: {folder} cannot be merged into {config.name} ({first_line(error)})") from None


def _inside(name: str, paths: Collection[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def load_about(source: str) -> Any:
    """Load the configuration of a model."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, **OWN_CODE)
    except Exception as error:  # whatever a broken folder makes the libraries raise
        raise UserError(f"model.name: {source} has no configuration that can be loaded ({first_line(error)})") from None


def load_processor(source: str) -> Any:
    """Load the image processor of a model."""
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(source, **OWN_CODE)
    except Exception as error:  # whatever a broken folder makes the libraries raise
        raise UserError(
            f"model.name: {source} has no image processor that can be loaded ({first_line(error)})"
        ) from None


def load_tokenizer(source: str, answers: bool = True) -> Any:
    """Load the tokenizer of a model; a missing pad token becomes the end-of-sequence token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **OWN_CODE)
    except Exception as error:  # whatever a broken folder makes the libraries raise
        raise UserError(f"model.name: {source} has no tokenizer that can be loaded ({first_line(error)})") from None
    if tokenizer.eos_token_id is None and (answers or tokenizer.pad_token_id is None):
        raise UserError(f"model.name: the tokenizer of {source} has no end-of-sequence token, so answers never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def positions(model: Any, tokenizer: Any = None) -> int | None:
    """How many positions the model has for tokens; None for one that has no limit (Bloom).

    A tokenizer is asked, too, where it is given: some encoders have positions that no token can have.
    """
    limits = (getattr(model.config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None))
    return min((int(limit) for limit in limits if limit), default=None)


def resolve_device(name: str, setting: str = "model.device") -> str:
    """``auto`` is a GPU where there is one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name.startswith("cuda"):
        if not count:
            raise UserError(f"{setting}: {name} is not available on this machine; use cpu or auto")
        if int(name.partition(":")[2] or 0) >= count:
            raise UserError(f"{setting}: there is no {name} on this machine, the last GPU is cuda:{count - 1}")
    if name == "auto":
        return "cuda" if count else "cpu"
    return name


def quantization(bits: str, heads: bool) -> Any:
    """The bitsandbytes configuration of the paper's code for 8 bit, NF4 for 4 bit; heads are not quantised."""
    skipped = ["score", "classifier", "pre_classifier"] if heads else None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"model.load_in: {bits} needs bitsandbytes; install it with: pip install 'fedalt[quantized]'")
    from transformers import BitsAndBytesConfig

    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skipped,
    )


def keep_trainable_through(model: nn.Module) -> None:
    """Stop 4-bit layers on AVX512-BF16 CPUs from repacking their weights into a form that has no gradient."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - no attribute of nn.Module


def fingerprint(model: nn.Module, without: Collection[str] = ()) -> str:
    """SHA-256 over names, shapes, dtypes and up to 65,536 evenly spaced elements of every weight.

    Sampling keeps a 7B model at a fraction of a second; fine-tuned weights differ everywhere, so they are told apart.
    Modules whose paths are in ``without`` are left out.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.state_dict().items()):
        if not isinstance(parameter, torch.Tensor) or _inside(name, without):
            continue
        flat = held(model, name, parameter).detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].contiguous().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
    return digest.hexdigest()


def _finite(weight: torch.Tensor) -> bool:
    if not weight.is_floating_point() or not weight.numel():
        return True
    return all(torch.isfinite(end) for end in torch.aminmax(weight.detach()))
