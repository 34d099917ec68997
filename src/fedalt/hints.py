"""What is wrong with a key or a value of the configuration, in one line, with a hint at the key that was meant."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel

from fedalt.errors import did_you_mean
from fedalt.registry import sections

ALIASES = {
    "lora.r": {"rank", "lora_r"},
    "lora.alpha": {"lora_alpha"},
    "lora.dropout": {"lora_dropout"},
    "lora.targets": {"target_modules", "lora_target_modules"},
    "training.lr": {"learning_rate"},
    "training.local_epochs": {"epochs", "num_train_epochs", "local_num_epochs"},
    "training.batch_size": {"per_device_train_batch_size", "local_batch_size", "micro_batch_size"},
    "training.schedule": {"lr_scheduler_type"},
    "federation.rounds": {"num_rounds", "num_server_rounds", "communication_rounds", "num_communication_rounds"},
    "federation.fraction": {"fraction_fit", "fraction_train", "client_selection_frac"},
    "data.clients": {"num_clients", "num_supernodes", "client_num"},
    "data.source": {"dataset", "dataset_name", "data_path"},
    "data.partition.alpha": {"dirichlet_alpha"},
    "model.name": {"model_name", "model_name_or_path", "base_model", "global_model"},
    "model.dtype": {"torch_dtype"},
}
"""What Hugging Face, PEFT, Flower and federated LoRA scripts call a key."""


def explain(error: Any, root: type[BaseModel]) -> str:
    """One of pydantic's errors as a line.

    Args:
        error: From ``ValidationError.errors()``.
        root: The configuration that was validated.
    """
    *path, last = [str(part) for part in error["loc"]] or [""]
    key = ".".join([*path, last])
    if error["type"] == "extra_forbidden":
        return f'unknown key "{key}"{_meant(last, path, root)}'
    message = error["msg"].removeprefix("Value error, ")
    return f'"{key}" = {error["input"]!r}: {message}' if key else message


def keys_at(path: Sequence[str], root: type[BaseModel]) -> list[str]:
    """The keys of a section; none where there is no section."""
    section = root
    for part in path:
        if section is root and part in (own := sections()):
            section = own[part]
            continue
        if part not in section.model_fields:
            return []
        annotation = section.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        section = annotation
    return list(section.model_fields)


def _meant(name: str, path: Sequence[str], root: type[BaseModel]) -> str:
    """The key of this name elsewhere, what others call so, the closest one here, or elsewhere; or all keys here."""
    known = keys_at(path, root)
    tops = dict.fromkeys((*root.model_fields, *sections()))
    known = known if path else [name for name in tops if name != "sections"]
    keys = {name: name for name in tops}
    keys |= {f"{section}.{key}": key for section in tops for key in keys_at([section], root)}
    called = [key for key, last in keys.items() if last == name] or [key for key in ALIASES if name in ALIASES[key]]
    if not called and (near := did_you_mean(name, known)):
        return near
    alike = get_close_matches(name, keys.values(), n=1, cutoff=0.75)
    called = called or [key for key, last in keys.items() if last in alike]
    return f' (did you mean "{called[0]}"?)' if called else f"; known here: {', '.join(known)}"
