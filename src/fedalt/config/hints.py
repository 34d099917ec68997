"""What is wrong with a key or a value of the configuration, in one line, with a hint at the key that was meant."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedalt.errors import alternatives, did_you_mean, shortened
from fedalt.registry import Registry, sections

ALIASES = {
    "lora.r": {"rank", "lora_r"},
    "lora.alpha": {"lora_alpha"},
    "lora.dropout": {"lora_dropout"},
    "lora.targets": {"target_modules", "lora_target_modules"},
    "lora.rslora": {"use_rslora"},
    "lora.layers": {"layers_to_transform"},
    "lora.exclude": {"exclude_modules"},
    "lora.distribution": {"init_lora_weights"},
    "training.lr": {"learning_rate"},
    "training.local_epochs": {"epochs", "num_train_epochs", "local_num_epochs"},
    "training.batch_size": {"per_device_train_batch_size", "local_batch_size", "micro_batch_size"},
    "training.accumulate": {"gradient_accumulation_steps", "accumulation_steps", "grad_accum"},
    "training.schedule": {"lr_scheduler_type", "lr_scheduler"},
    "training.warmup": {"warmup_steps", "warmup_ratio"},
    "training.betas": {"adam_beta1", "adam_beta2"},
    "training.eps": {"adam_epsilon", "adam_eps"},
    "training.optimizer": {"optim"},
    "evaluation.early_stop": {"early_stopping_patience", "early_stopping", "patience"},
    "federation.rounds": {"num_rounds", "num_server_rounds", "communication_rounds", "num_communication_rounds"},
    "federation.fraction": {"fraction_fit", "fraction_train", "client_selection_frac"},
    "data.clients": {"num_clients", "num_supernodes", "client_num"},
    "data.source": {"dataset", "dataset_name", "data_path"},
    "data.partition.alpha": {"dirichlet_alpha"},
    "model.name": {"model_name", "model_name_or_path", "base_model", "global_model"},
    "model.dtype": {"torch_dtype"},
}
"""What Hugging Face, PEFT, Flower and federated LoRA scripts call a key."""


_DORA = "DoRA is not supported: its magnitudes are no mean of clients'; lora.rslora=true helps large ranks"
_REFUSED = {"dora": _DORA, "use_dora": _DORA}
"""What others have and there is none of, and why."""
_KINDS = {
    "int": "must be a whole number",
    "float": "must be a number",
    "finite": "must be a finite number",
    "bool": "must be true or false",
    "string": "must be text",
    "tuple": "must be a list",
    "list": "must be a list",
    "dict": "must be a mapping of keys to values",
    "missing": "is missing",
}
"""First word of the name of pydantic's errors → what to do about them."""
_BOUNDS = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}


def explain(error: Any, root: type[BaseModel], where: str, typed: Mapping[str, str] | None = None) -> str:
    """One of pydantic's errors as a line: where, which setting, what it is and what it may be.

    What was ``typed`` for a key, such as ``--rank 0``, stands in place of file, key and value.
    """
    if error["type"] == "invalid_key":
        return f"{where}: {shortened(str(error['loc'][-1]))}: keys are text"
    inside = any(isinstance(part, int) for part in error["loc"])
    *path, last = [part for part in error["loc"] if not isinstance(part, int) and part != "[key]"] or [""]
    key, value = ".".join([*path, last]), error["input"]
    known = (typed or {}).get(key)
    subject = known or f"{where}: {key}"
    if error["type"] == "extra_forbidden":
        if last in _REFUSED:
            return f"{known or where}: {key}: {_REFUSED[last]}"
        return f'{known or where}: unknown key "{shortened(key)}"{_meant(last, path, root)}'
    problem = _problem(error, key, root)
    if not key:  # found by a look at several settings
        about, _, rest = problem.partition(": ")
        return f"{typed[about]}: {rest}" if typed and about in typed else f"{where}: {problem}"
    if inside:
        return f"{subject}: {_shown(value)} {problem}"
    return f"{subject}: {problem}" if known or _is_section(value) else f"{subject} = {_shown(value)}: {problem}"


def in_words(field: FieldInfo) -> str:
    """What a setting may be: its kind, and its range or its choices."""
    return _in_words(field.annotation, field.metadata)


def _in_words(kind: Any, bounds: Sequence[Any] = ()) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    for registry in (bound for bound in bounds if isinstance(bound, Registry)):
        return alternatives(registry.names())
    if origin is Annotated:
        return _in_words(inner[0], inner[1:])
    if origin in (Union, UnionType):
        return " or ".join(_in_words(one, bounds) for one in inner if one is not NoneType)
    if origin is Literal:
        return alternatives(inner)
    if origin in (tuple, list):
        return f"list of: {_in_words(inner[0])}"
    names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    given = [(word, getattr(bound, name)) for bound in bounds for name, word in _BOUNDS.items() if hasattr(bound, name)]
    return ", ".join([names.get(origin or kind, "mapping"), *(f"{word} {limit:g}" for word, limit in given)])


def _problem(error: Any, key: str, root: type[BaseModel]) -> str:
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"must be {alternatives(choices)}{did_you_mean(value, choices) if isinstance(value, str) else ''}"
    if kind.startswith("model"):
        return f"is a section, of settings such as {key}.{keys_at(key.split('.'), root)[0]}"
    if kind == "too_short":
        return "must not be empty" if context["min_length"] == 1 else f"needs {context['min_length']} values"
    bound = next((f"must be {word} {context[name]:g}" for name, word in _BOUNDS.items() if name in context), None)
    return bound or _KINDS.get(kind.split("_")[0], "is not allowed")


def _is_section(value: Any) -> bool:
    return isinstance(value, BaseModel | Mapping)


def _shown(value: Any) -> str:
    """A value as YAML has it, in one short line."""
    if isinstance(value, str):
        return f'"{shortened(value)}"'
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    try:
        return shortened(str(value))
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a very large number"


def keys_at(path: Sequence[str], root: type[BaseModel]) -> list[str]:
    """The keys of a section; none where there is no section."""
    return list(fields_at(path, root))


def fields_at(path: Sequence[str], root: type[BaseModel]) -> Mapping[str, FieldInfo]:
    """Key → field of a section; none where there is no section."""
    section = root
    for part in path:
        field = section.model_fields.get(part)
        found = field.annotation if field else sections().get(part) if section is root else None
        if not (isinstance(found, type) and issubclass(found, BaseModel)):
            return {}
        section = found
    return section.model_fields


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
