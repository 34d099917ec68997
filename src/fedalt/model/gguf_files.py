"""Writing a causal LM as one GGUF file, for llama.cpp and what is built on it.

Llama's and Qwen2's architectures with a byte-level BPE tokenizer; everything else is refused, since a file that is
nearly right answers nearly right.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fedalt.errors import UserError, alternatives

KINDS = ("q8_0", "f16")
"""What matrices may be kept as; vectors stay in fp32."""
_BLOCK = 32
"""Numbers that share a step in Q8_0: rows of another length stay F16."""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}
"""How a tokenizer splits text before it merges → llama.cpp's name for that."""


def write_gguf(path: Path, model: Any, tokenizer: Any, kind: str) -> None:
    """Write model and tokenizer; ``dequantized`` reads them again."""
    check_gguf(model, tokenizer)
    import gguf

    config, name = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if kind == "q8_0" else gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    arch = gguf.MODEL_ARCH.LLAMA if name == "llama" else gguf.MODEL_ARCH.QWEN2
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, value in _tensors(model):
        array = value.detach().float().cpu().numpy()
        packs = array.ndim == 2 and kind == "q8_0" and array.shape[1] % _BLOCK == 0
        wide = "F32" if array.ndim == 1 else "Q8_0" if packs else "F16"
        packed = gguf.quants.quantize(np.ascontiguousarray(array), gguf.GGMLQuantizationType[wide])
        writer.add_tensor(
            names.get_name(key, (".weight", ".bias")) or key, packed, raw_dtype=gguf.GGMLQuantizationType[wide]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_gguf(model: Any, tokenizer: Any) -> None:
    """Refuse a model, or a tokenizer, that the file would not hold as it is."""
    config = model.config
    if importlib.util.find_spec("gguf") is None:
        raise UserError("--gguf needs: pip install 'fedalt[gguf]'")
    if config.model_type not in ("llama", "qwen2"):
        raise UserError(f"--gguf: {config.model_type} is not written; only llama and qwen2 are")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    unlike = {
        f"rotary positions of kind {rope}": rope != "default",
        "heads whose widths do not add up to its own": head * config.num_attention_heads != config.hidden_size,
        "biases": config.model_type == "llama" and (config.attention_bias or config.mlp_bias),
        "a sliding window": getattr(config, "use_sliding_window", False),
    }
    if found := [what for what, there in unlike.items() if there]:
        raise UserError(f"--gguf: this {config.model_type} has {' and '.join(found)}, which are not written")
    _pre_tokenizer(tokenizer)
    if max(tokenizer.get_vocab().values()) >= config.vocab_size:
        raise UserError("--gguf: the tokenizer has tokens that the model has no embeddings for")


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Weights by Hugging Face's names; queries and keys of a Llama in llama.cpp's order of rotary dimensions."""
    config = model.config
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        count = heads.get(".".join(name.split(".")[-2:]))
        if count and config.model_type == "llama":
            value = value.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(value.shape)  # noqa: PLW2901
        yield name, value


def _add_tokenizer(writer: Any, tokenizer: Any, size: int) -> None:
    from gguf import TokenType

    about = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [TokenType.UNUSED] * size
    for token, i in tokenizer.get_vocab().items():
        tokens[i], kinds[i] = token, TokenType.NORMAL
    for added in about["added_tokens"]:
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in about["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "pad", "unk"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    some = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(some[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(some[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(tokenizer: Any) -> str:
    """llama.cpp's name for how a byte-level BPE tokenizer splits text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    about = json.loads(backend.to_str()) if backend else {"model": {}}
    before = about.get("pre_tokenizer") or {}
    steps: list[dict[str, Any]] = before.get("pretokenizers", [before])
    first, last = steps[:-1], steps[-1]
    alike = (about.get("normalizer") or {}).get("type") in (None, "NFC")
    if about["model"].get("type") == "BPE" and last.get("type") == "ByteLevel" and alike:
        match first:
            case [] if last["use_regex"] and not last["add_prefix_space"]:
                return "gpt-2"
            case [{"type": "Digits", "individual_digits": True}] if last["use_regex"]:
                return "smollm"
            case [{"type": "Split", "pattern": {"Regex": split}}] if split in _SPLITS and not last["use_regex"]:
                return _SPLITS[split]
    raise UserError(f"--gguf: the tokenizer is none of those that are written: byte-level BPE as in {_KNOWN}")


_KNOWN = alternatives(("GPT-2", "Llama 3", "Qwen2", "SmolLM"))
