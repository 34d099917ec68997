"""Adapters as ordinary PEFT LoRA folders, each with the client's classification head, if any; the mixer beside them.

individual/{adapter_config.json, adapter_model.safetensors}     loads with PEFT
row/{adapter_config.json, adapter_model.safetensors}            loads with PEFT
mixer.safetensors                                               base_model.model.<module>.mixer.weight [m, d_in]
extra.safetensors                                               for methods that merge into the base or compare prompts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from fedalt.config import Task
from fedalt.errors import UserError
from fedalt.files import read_json, write_bytes, write_json
from fedalt.names import ANCHOR, EVIDENCE, HEAD, MERGED, MIXER, A, B, C, G, Key, Tensors, parted

_PREFIX = "base_model.model."
_FACTORS = {A: ".lora_A.weight", B: ".lora_B.weight"}
_MIXER = {G: ".mixer.weight", C: ".mixer.bias"}
_TASKS = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS", "image_classification": None}
WEIGHTS = "adapter_model.safetensors"
MIXER_FILE = "mixer.safetensors"
EXTRA_FILE = "extra.safetensors"


@dataclass(frozen=True)
class LoraFolder:
    """What PEFT must be told about a LoRA.

    Attributes:
        base: Folder or hub name of the base model.
        alpha: LoRA numerator, so that the scale is alpha/r.
        fan_in_fan_out: Whether the base layers are GPT-2's Conv1D.
        rslora: Whether the scale is alpha over the root of r.
    """

    base: str
    r: int
    alpha: float
    dropout: float
    fan_in_fan_out: bool
    task: Task = "causal_lm"
    rslora: bool = False


def write_lora(folder: Path, tensors: Tensors, slot: str, lora: LoraFolder) -> None:
    """Write one slot, and heads with it, as a PEFT LoRA folder."""
    from peft import LoraConfig

    keys = [key for key in tensors if key.slot == slot]
    named = {f"{_PREFIX}{key.module}{_FACTORS[key.factor]}": tensors[key].contiguous() for key in keys}
    heads = parted(tensors)[1]
    named |= {f"{_PREFIX}{key.module}.{key.factor}": value.contiguous() for key, value in heads.items()}
    config = LoraConfig(
        task_type=_TASKS[lora.task],
        modules_to_save=sorted({_saved_as(key.module) for key in heads}) or None,
        base_model_name_or_path=lora.base,
        r=lora.r,
        lora_alpha=int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,  # type: ignore[arg-type]
        use_rslora=lora.rslora,
        lora_dropout=lora.dropout,
        target_modules=sorted({key.module for key in keys}),
        fan_in_fan_out=lora.fan_in_fan_out,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    path = folder / "adapter_config.json"
    about = read_json(path)
    write_json(path, about | {"target_modules": sorted(about["target_modules"])})  # PEFT writes a set, in any order
    write_bytes(folder / WEIGHTS, save(named, metadata={"format": "pt"}))


def _saved_as(head: str) -> str:
    """The module that PEFT keeps a head in: all of a ``classifier`` or ``score``, whatever is named besides."""
    parts = head.split(".")
    whole = next((i for i, part in enumerate(parts) if part in ("classifier", "score")), len(parts))
    return ".".join(parts[: whole + 1])


def write_mixer(folder: Path, tensors: Tensors) -> None:
    """Write every layer's mixer in one file: G, and its shift where there is one."""
    parts = {k: v.flatten() if k.factor == C else v for k, v in tensors.items() if k.slot == MIXER}
    named = {f"{_PREFIX}{k.module}{_MIXER[k.factor]}": v.contiguous() for k, v in parts.items()}
    write_bytes(folder / MIXER_FILE, save(named, metadata={"format": "pt"}))


def write_extras(folder: Path, tensors: Tensors) -> None:
    """Write what is neither a LoRA nor a mixer, if there is such: what is merged, the anchor, held-out losses."""
    named = {str(key): value.contiguous() for key, value in tensors.items() if key.slot in (MERGED, ANCHOR, EVIDENCE)}
    if named:
        write_bytes(folder / EXTRA_FILE, save(named, metadata={"format": "pt"}))


def read_folder(folder: Path, slots: Sequence[str], mixed: bool) -> dict[Key, Tensor]:
    """Read the LoRA folders of some slots, the mixer, and what else there is."""
    tensors: dict[Key, Tensor] = {}
    for slot in slots:
        for name, value in _load(folder / slot / WEIGHTS).items():
            factor = next((f for f, ending in _FACTORS.items() if name.endswith(ending)), None)
            if factor is None:
                if ".lora_" in name:
                    raise UserError(f"{folder / slot / WEIGHTS}: unknown tensor {name}")
                tensors[_head(name)] = value
                continue
            tensors[Key(name.removeprefix(_PREFIX).removesuffix(_FACTORS[factor]), slot, factor)] = value
    if mixed:
        for name, value in _load(folder / MIXER_FILE).items():
            factor = next(f for f, ending in _MIXER.items() if name.endswith(ending))
            key = Key(name.removeprefix(_PREFIX).removesuffix(_MIXER[factor]), MIXER, factor)
            tensors[key] = value[:, None] if factor == C else value
    if (folder / EXTRA_FILE).is_file():
        tensors |= {Key.parse(name): value for name, value in _load(folder / EXTRA_FILE).items()}
    return tensors


_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "use_dora": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}
"""What the configuration of a LoRA says that is nothing but factors of one rank."""


def read_plain_lora(folder: Path) -> tuple[int, float, dict[tuple[str, str], Tensor]]:
    """Rank, scale and factors, by module path and A or B, of a LoRA that PEFT has written."""
    about = read_adapter_config(folder)
    odd = next((key for key, plain in _PLAIN.items() if (about.get(key) or plain) != plain), None)
    if odd:
        kind = "a DoRA" if odd == "use_dora" else f"no plain LoRA ({odd} is {about[odd]})"
        raise UserError(
            f"model.adapter: {folder} is {kind}, so no LoRA can start from it; model.adapter_as=merged may do"
        )
    tensors = {
        (key.module, key.factor): value.float() for key, value in read_folder(folder, (".",), mixed=False).items()
    }
    if {factor for _, factor in tensors} != {A, B}:
        raise UserError(f"model.adapter: {folder} holds other tensors than a LoRA's")
    rank = int(about["r"])
    return rank, about["lora_alpha"] / (rank**0.5 if about.get("use_rslora") else rank), tensors


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The ``adapter_config.json`` of ``model.adapter``."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"model.adapter: {folder} is no folder of a PEFT adapter (no adapter_config.json)")
    about: dict[str, Any] = read_json(path)
    return about


def _head(name: str) -> Key:
    module, factor = name.removeprefix(_PREFIX).rsplit(".", 1)
    return Key(module, HEAD, factor)


def _load(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: missing")
    try:
        return load_file(path)
    except Exception as error:
        raise UserError(f"{path}: damaged ({error})") from None
