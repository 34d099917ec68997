"""``python -m tools.models [KIND …] [--out FILE.md]``: which architectures of Transformers work, by trying.

Each is built small, with random weights, saved, and taken through a whole run of two clients with unlike rows, stacked
and one after another. A line of the table says what was seen:

    targets   layers that get adapters when none are named
    rows      packed, or padded and why
    alone     a batch gives what each row gives alone in the plain model, past any window (relative difference)
    loop      stacked training gives what clients one after another give (relative difference)
    answers   the run's own answers are those that the exported LoRA gives in PEFT, with ``generate``, a prompt at a
              time; for classifiers the same of probabilities

A model works if both differences are rounding and every answer is the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedalt.api import Run, load_base, load_data, run
from fedalt.errors import UserError
from fedalt.files import write_text
from fedalt.model.batch_layout import BatchLayout
from fedalt.model.source import TINY_BASE, resolve_source
from fedalt.model.targets import ALL_LINEAR, backbone_of
from fedalt.personal.chat import Chat
from fedalt.personal.rescore import rescore
from fedalt.runs.folder import finished_run
from fedalt.runs.setup import Resident, load_resident

_SMALL: dict[str, Any] = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 64, "ffn_hidden_size": 64, "n_inner": 64, "ffn_dim": 64, "hidden_dim": 64,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "max_position_embeddings": 256, "n_positions": 256, "max_seq_len": 256, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "state_size": 8,
    "initializer_range": 0.2, "init_std": 0.2,
    "sliding_window": 12, "window_size": 12, "attention_chunk_size": 12, "rotary_dim": 4, "pad_token_id": 0,
    "image_size": 16, "patch_size": 4, "num_channels": 3,
}  # fmt: skip
"""Sizes under all the names that configurations have for them; the window is shorter than the rows."""


@dataclass(frozen=True)
class Case:
    """A model type of Transformers and a task."""

    title: str
    kind: str
    task: str = "causal_lm"


_NAMES = {
    "Llama": "llama", "Mistral": "mistral", "Mixtral": "mixtral", "Qwen 2": "qwen2", "Qwen 2 MoE": "qwen2_moe",
    "Qwen 3": "qwen3", "Qwen 3 MoE": "qwen3_moe", "Gemma": "gemma", "Gemma 2": "gemma2", "Gemma 3": "gemma3_text",
    "Gemma 3 with images": "gemma3",
    "Phi": "phi", "Phi-3": "phi3", "Phi-MoE": "phimoe", "GPT-2": "gpt2", "GPT-Neo": "gpt_neo", "GPT-NeoX": "gpt_neox",
    "GPT-J": "gptj", "OPT": "opt", "Bloom": "bloom", "Falcon": "falcon", "MPT": "mpt", "StableLM": "stablelm",
    "StarCoder 2": "starcoder2", "OLMo": "olmo", "OLMo 2": "olmo2", "Granite": "granite", "Cohere": "cohere",
    "SmolLM 3": "smollm3", "GLM-4": "glm4", "DeepSeek-V3": "deepseek_v3", "Llama 4": "llama4_text",
    "GPT-OSS": "gpt_oss", "MiniMax": "minimax", "Doge": "doge", "Mamba": "mamba", "Mamba 2": "mamba2", "RWKV": "rwkv",
    "ModernBERT decoder": "modernbert-decoder", "BERT as a causal LM": "bert",
}  # fmt: skip
_MORE: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "falcon": {"new_decoder_architecture": False},
    "deepseek_v3": {"num_key_value_heads": 4},
    "gemma3": {
        "mm_tokens_per_image": 4,
        "vision_config": {
            "model_type": "siglip_vision_model",
            **{name: _SMALL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
            **{name: _SMALL[name] for name in ("intermediate_size", "image_size", "patch_size")},
        },
    },
    "mamba2": {"expand": 2, "num_heads": 8, "n_groups": 2},
    "swin": {
        "num_heads": [2, 2],
        "num_attention_heads": [2, 2],
        "depths": [1, 1],
        "embed_dim": 16,
        "window_size": 2,
        "patch_size": 2,
    },
    "convnext": {"hidden_sizes": (8, 16), "depths": (1, 1)},
    "resnet": {"embedding_size": 8, "hidden_sizes": (8, 16), "depths": (1, 1)},
}
_TEXT = ("bert", "roberta", "distilbert", "deberta-v2", "electra", "albert", "modernbert", "mpnet", "xlm-roberta")
_DECODING = ("llama", "gpt2", "qwen2", "mistral", "bloom", "opt")
_IMAGES = ("vit", "ijepa", "swin", "beit", "dinov2", "convnext", "resnet")
CASES = (
    *(Case(title, kind) for title, kind in _NAMES.items()),
    *(Case(f"{kind}, text classifier", kind, "sequence_classification") for kind in (*_TEXT, *_DECODING)),
    *(Case(f"{kind}, image classifier", kind, "image_classification") for kind in _IMAGES),
)
_CLASSES = {
    "causal_lm": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
}
_EXACT = 1e-4
"""Relative difference that fp32 rounds to."""
COLUMNS = ("model", "works", "targets", "rows", "alone", "loop", "answers")


def _configuration(case: Case, vocabulary: int) -> Any:
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[case.kind]
    return kind(**{**_sizes(kind, vocabulary), **_MORE.get(case.kind, {})})


def _sizes(kind: Any, vocabulary: int) -> dict[str, Any]:
    """Small sizes for a class of configurations, and for those within."""
    known = kind().to_dict()
    small = {name: value for name, value in _SMALL.items() if name in known or name in kind.attribute_map}
    if known.get("layer_types"):
        small["layer_types"] = (list(dict.fromkeys(known["layer_types"])) * 2)[:2]
    ends = {"vocab_size": vocabulary, "eos_token_id": 1, "bos_token_id": 1} if "vocab_size" in known else {}
    within = {name: inside for name, inside in kind.sub_configs.items() if hasattr(inside, "model_type")}
    return {**small, **ends, **{name: _sizes(inside, vocabulary) for name, inside in within.items()}}


def _rows(folder: Path, labelled: bool) -> Path:
    """Two clients whose prompts have unlike lengths, past the window."""
    for client in range(2):
        for split, start, count in (("train", 0, 6), ("test", 10, 5)):
            rows = [
                {
                    "instruction": f"Say {i}{' and so on' * (i % 3)}.",
                    "output": str(i % 2) if labelled else f"{i + client}{' then more' * (i % 2)}",
                }
                for i in range(start, start + count)
            ]
            ending = {"train": "training", "test": "testing"}[split]
            write_text(folder / split / f"local_{ending}_{client}.json", json.dumps(rows))
    return folder


def try_one(case: Case, scratch: Path) -> dict[str, str]:
    """Column → what was seen; ``works`` holds the line of an error where the model is refused."""
    import transformers

    folder, images = scratch / "base", case.task == "image_classification"
    read: Any
    if images:
        read = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
        data: dict[str, Any] = {"source": "digits", "clients": 2, "train_limit": 60, "test_limit": 4}
    else:
        read = transformers.AutoTokenizer.from_pretrained(resolve_source(TINY_BASE))
        data = {"source": _rows(scratch / "rows", case.task != "causal_lm")}
    torch.manual_seed(0)
    auto = getattr(transformers, _CLASSES[case.task])
    made = auto.from_config(_configuration(case, 0 if images else len(read)))
    made.save_pretrained(folder)
    read.save_pretrained(folder)
    base: dict[str, Any] = {"device": "cpu", "task": case.task}
    if images:
        base["labels"] = tuple("0123456789")
    settings = {"evaluation.max_new_tokens": 8, "lora.dropout": 0}
    runs: dict[str, Run] = {}
    targets = ""
    while len(runs) < 2:
        executor = ("stacked", "loop")[len(runs)]
        try:
            runs[executor] = run(
                load_data(**data),
                load_base(folder, **base),
                "local",
                rounds=1,
                epochs=2,
                lr=1e-2,
                batch_size=3,
                seed=0,
                settings={**settings, "federation.executor": executor},
                quiet=True,
                out=scratch / executor,
            )
        except UserError as error:
            if ALL_LINEAR not in str(error) or targets:
                return {"works": f"refused: {error}"}
            targets, base["targets"] = ALL_LINEAR, [ALL_LINEAR]
    return _looked_at(runs, auto, folder, targets)


def _looked_at(runs: Mapping[str, Run], auto: Any, folder: Path, targets: str) -> dict[str, str]:
    resident = load_resident(finished_run(runs["stacked"].folder)[1])
    model = resident.model
    names = targets or ", ".join(dict.fromkeys(path.rsplit(".", 1)[-1] for path in model.layers))
    loop = max(
        _apart(mine, _adapters(runs["loop"].folder, client)[name])
        for client in (0, 1)
        for name, mine in _adapters(runs["stacked"].folder, client).items()
    )
    same, asked = _answers(runs["stacked"], resident, auto, folder)
    rows = "packed" if model.packs else f"padded: {model.unpacked}" if model.unpacked else "as they are"
    alone = 0.0 if model.sees else _alone(model, backbone_of(auto.from_pretrained(folder).eval()))
    works = max(loop, alone) < _EXACT and same == asked
    seen = (names, rows, f"{alone:.0e}", f"{loop:.0e}", f"{same} of {asked}")
    return {"works": "yes" if works else "no", **dict(zip(COLUMNS[2:], seen, strict=True))}


def _adapters(folder: Path, client: int) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(next((folder / "clients" / str(client)).rglob("adapter_model.safetensors")))


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp_min(1e-12))


@torch.no_grad()
def _alone(model: Any, plain: Any) -> float:
    """How far a batch's states are from those of each row alone in the plain model."""
    lengths = (40, 9, 31)
    ids = torch.randint(5, 90, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    options = {} if model.heads else {"use_cache": False}
    alone = [plain(input_ids=part[None], **options).last_hidden_state[0] for part in ids.split(list(lengths))]
    model.clear()
    together = model.hidden(ids, BatchLayout((3, *(0,) * (model.clients - 1)), lengths)).last_hidden_state
    return _apart(together, torch.cat(alone))


@torch.no_grad()
def _answers(done: Run, resident: Resident, auto: Any, folder: Path) -> tuple[int, int]:
    """How many of the run's answers the exported LoRA gives in PEFT, and of how many."""
    from peft import PeftModel

    same = asked = 0
    scored = rescore(done.folder, None, None, False)
    for client in done.clients:
        chat, lora = Chat(done.folder, client, resident), done.folder / "clients" / str(client) / "individual"
        encoder: Any = chat.encoder
        labels = chat.config.model.labels
        options = {"num_labels": len(labels), "ignore_mismatched_sizes": True} if labels else {}
        plain: Any = PeftModel.from_pretrained(auto.from_pretrained(folder, **options), str(lora)).eval()
        for row, line in zip(done.data.clients[client].test, scored[client].lines, strict=True):
            asked += 1
            if labels:
                model = chat.resident.model
                found = encoder.pixels(row)[None] if model.sees else torch.tensor([encoder.prompt(row.instruction)])
                scores = plain(found).logits
                chances = chat.ask(row).chances
                same += torch.allclose(
                    scores[0].softmax(0), torch.tensor([chances[label] for label in labels]), atol=1e-4
                )
                continue
            ids = torch.tensor([encoder.prompt(row.instruction)])
            tokenizer = chat.resident.base.tokenizer
            ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            out = plain.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **ends
            )
            text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
            same += text == line["answer"] == chat.ask(row).text
    return same, asked


def table(seen: Iterable[tuple[Case, Mapping[str, str]]]) -> str:
    """The table in Markdown."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [(case.title, *(row.get(column, "") for column in COLUMNS[1:])) for case, row in seen]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Try all models, or some kinds; 1 if one neither works nor is refused."""
    parser = argparse.ArgumentParser(description="Which architectures of Transformers work, by trying.")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="model types; all when not given")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there, in Markdown")
    asked = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    seen: list[tuple[Case, dict[str, str]]] = []
    for case in CASES:
        if asked.kinds and case.kind not in asked.kinds:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            try:
                row = try_one(case, Path(scratch))
            except Exception as error:  # whatever a model makes the libraries raise
                row = {"works": f"no: {type(error).__name__}: {error}".split("\n")[0]}
        seen.append((case, row))
        sys.stdout.write(f"{case.title:30} {'  '.join(f'{name}: {value}' for name, value in row.items())}\n")
        sys.stdout.flush()
    if asked.out:
        write_text(asked.out, table(seen))
    return int(any(row["works"].startswith("no") for _, row in seen))


if __name__ == "__main__":
    sys.exit(main())
