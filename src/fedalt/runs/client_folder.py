"""A client's folder: its personal model, readable by PEFT and by twenty lines of plain torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

from fedalt.compat import slot_today
from fedalt.data.batches import Noise
from fedalt.data.encode import template_text
from fedalt.errors import UserError, listed
from fedalt.files import intact, new_folder, read_json, write_json
from fedalt.model.base import Base
from fedalt.model.layer import Mixing, Placement
from fedalt.model.peft_files import LoraFolder, read_folder, write_extras, write_lora, write_mixer
from fedalt.model.state import ClientState
from fedalt.names import Key, parted
from fedalt.runs.folder import RunFolder, Which, final_scores
from fedalt.runs.setup import Experiment
from fedalt.training.privacy import spent

CONFIG = "fedalt_config.json"
MERGED_FIRST = "merged_first"
"""Folder of the adapter that was merged into the base before the first round, and must be before these are added."""


def write_client(path: Path, state: ClientState, experiment: Experiment, round_: int) -> None:
    """Write a client's LoRAs as PEFT folders, its mixer, and ``fedalt_config.json``, whole or not at all."""
    placement = experiment.settings.answering
    with new_folder(path) as folder:
        for slot in placement.slots:
            write_lora(folder / slot, {**state.tensors, **state.heads}, slot, lora_folder(experiment, slot))
        if placement.mixed:
            write_mixer(folder, state.tensors)
        write_extras(folder, state.tensors)
        how = experiment.config.model
        if how.adapter and how.adapter_as == "merged":
            shutil.copytree(how.adapter, folder / MERGED_FIRST)
        write_json(folder / CONFIG, client_config(experiment, state, round_))


def save_client(run: RunFolder, state: ClientState, experiment: Experiment, round_: int) -> None:
    """Write a client's folder: of a run's last round, and after it of its best one, if that is another.

    With early stopping it is the best round's that ``clients/`` keeps, and the last round's goes to ``last/``.
    """
    path = run.client(state.client)
    there = read_json(path / CONFIG)["round"] if (path / CONFIG).is_file() else 0
    others: dict[Which, Path] = {which: run.other_round(state.client, which) for which in get_args(Which)}
    if there < round_:  # a last round that is new
        for other in others.values():
            shutil.rmtree(other, ignore_errors=True)
    elif there > round_ and experiment.config.evaluation.early_stop is None:
        path = others["best"]
    elif there > round_:
        shutil.rmtree(others["last"], ignore_errors=True)
        others["last"].parent.mkdir(exist_ok=True)
        path.rename(others["last"])
    write_client(path, state, experiment, round_)


def lora_folder(experiment: Experiment, slot: str) -> LoraFolder:
    """What PEFT is told about one of this run's LoRAs; alpha is such that alpha over its rank is the run's scale."""
    lora, resident = experiment.config.lora, experiment.resident
    ranks = experiment.shape.ranks
    rank = ranks.get(slot) or max(ranks.values())  # a fused slot has the rank of what it is made of
    conv = any(type(layer.base_layer).__name__ == "Conv1D" for layer in resident.model.layers.values())
    scale = experiment.settings.answering.scale
    alpha = round(scale * rank**0.5, 9) if lora.rslora else scale * rank
    return LoraFolder(resident.base.source, rank, alpha, lora.dropout, conv, experiment.config.model.task, lora.rslora)


def client_config(experiment: Experiment, state: ClientState, round_: int) -> dict[str, Any]:
    """What somebody without fedalt needs to know to use the folder."""
    config, base, placement = experiment.config, experiment.resident.base, experiment.settings.answering
    answers = {
        "template": config.data.template,
        "prompt": template_text(config.data.template),
        "max_new_tokens": config.evaluation.max_new_tokens,
        "num_beams": config.evaluation.num_beams,
    }
    noise = experiment.noise(state.client)
    return {
        "method": config.method,
        "task": config.model.task,
        "client_id": state.client,
        "round": round_,
        "scale": placement.scale,
        "slots": list(placement.slots),
        "mixer_order": list(placement.slots) if placement.mixed else None,
        "mixing": asdict(placement.mixing),
        "r": config.lora.r,
        "alpha": config.lora.alpha,
        **(
            {"labels": list(config.model.labels or ()), "pooling": config.model.pooling}
            if config.classifies
            else answers
        ),
        **({"privacy": privacy(noise, state.private_steps)} if noise and state.private_steps else {}),
        "base": {"name": config.model.name, "source": base.source, "sha256": base.sha256, "dtype": config.model.dtype},
    }


def privacy(noise: Noise, steps: int) -> dict[str, Any]:
    """What a client has spent, and how."""
    how = {"noise_multiplier": noise.multiplier, "clip": noise.clip, "rate": noise.rate, "steps": steps}
    return {"epsilon": spent(noise, steps), "delta": noise.delta, **how}


@dataclass(frozen=True)
class PersonalModel:
    """A client's adapters as read from its folder, how they sit on the base, and what ``privacy`` was spent."""

    state: ClientState
    placement: Placement
    privacy: Mapping[str, Any] | None = None


def read_client(run: RunFolder, client: int, base: Base, which: Which | None = None) -> PersonalModel:
    """Load a client's folder, of the round that is kept or of another; see ``client_folder``."""
    path = client_folder(run, client, which)
    about = read_json(path / CONFIG)
    with intact(path / CONFIG):
        if about["base"]["sha256"] != base.sha256:
            raise UserError(f"{path}: made for another base model ({about['base']['source']}); the weights differ")
        placement = Placement(tuple(about["slots"]), Mixing.parse(about["mixing"]), float(about["scale"]), 0.0)
        who, round_ = int(about["client_id"]), int(about["round"])
    if who != client:
        raise UserError(f"{path}: holds client {who}, not client {client}")
    tensors, heads = parted(read_folder(path, placement.slots, placement.mixed))
    tensors = {Key(k.module, slot_today(k.slot), k.factor): value for k, value in tensors.items()}
    placement = replace(placement, slots=tuple(map(slot_today, placement.slots)))
    return PersonalModel(ClientState(who, round_, tensors, heads=heads), placement, about.get("privacy"))


def client_folder(run: RunFolder, client: int, which: Which | None = None) -> Path:
    """A client's folder, of the round that is kept, or of the best or the last one."""
    if not (run.client(client) / CONFIG).is_file():
        raise UserError(f"{run.path}: no client {client} here; known: {listed(client_ids(run)) or 'none'}")
    if which is None:
        return _intact(run, run.client(client))
    scores = final_scores(run)
    asked = scores["last" if which == "last" else "best_validation"]
    if asked is None:
        raise UserError(f"{run.path}: --round best: no client has validation rows (data.validation_rows)")
    for path in (run.client(client), run.other_round(client, which)):
        if (path / CONFIG).is_file() and read_json(path / CONFIG)["round"] == asked["round"]:
            return _intact(run, path)
    raise UserError(f"{run.path}: the adapters of round {asked['round']} were not kept")


def _intact(run: RunFolder, path: Path) -> Path:
    run.check(f"{path.relative_to(run.path).as_posix()}/")
    return path


def client_ids(run: RunFolder) -> list[int]:
    """Clients that have a folder in a run."""
    names = (path.parent.name for path in run.path.glob(f"clients/*/{CONFIG}"))
    return sorted(int(name) for name in names if name.isdecimal())
