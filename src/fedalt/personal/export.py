"""Taking one client's model away: its PEFT folders and mixer, or one static LoRA and what that costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedalt.config import RunConfig
from fedalt.data.encode import ClientExamples, encode_federation
from fedalt.data.load import load_federation
from fedalt.errors import UserError
from fedalt.evaluation.evaluate import evaluate
from fedalt.evaluation.prompt_similarity import load_to_answer
from fedalt.files import disk_errors, write_bytes
from fedalt.model.layer import SUM
from fedalt.model.peft_files import LoraFolder, write_lora
from fedalt.model.state import ClientState
from fedalt.names import MERGED, A, B, Key
from fedalt.runs.client_folder import PersonalModel, client_folder, read_client
from fedalt.runs.folder import Which, finished_run
from fedalt.runs.setup import Resident, load_resident
from fedalt.training.loop import mixer_weights

STATIC = "static"
_PROMPTS = 64


@dataclass(frozen=True)
class StaticExport:
    """What a static LoRA costs.

    Attributes:
        personal: Score of the personal model on the client's test rows.
        static: Score of the static LoRA on the same rows.
        metric: What the scores are.
        alpha: Layer path → the fixed weight of the first slot.
    """

    personal: float
    static: float
    metric: str
    alpha: dict[str, float]


def export_folders(run: Path, client: int, to: Path, which: Which | None = None) -> None:
    """Copy a client's PEFT folders, mixer and configuration, of the round that is kept or of another."""
    folder, _ = finished_run(run)
    source = client_folder(folder, client, which)
    _check_free(to)
    for path in sorted(source.rglob("*")):
        if path.is_file():
            write_bytes(to / path.relative_to(source), path.read_bytes())


def export_static(run: Path, client: int, to: Path, which: Which | None = None) -> StaticExport:
    """Write one ordinary LoRA of rank m·r with the mixer frozen at its mean over training prompts.

        A = [A_1; …; A_m],   B = [ᾱ_1 B_1, …, ᾱ_m B_m],   alpha·m over rank m·r keeps the scale

    The mixer depends on the input and cannot be merged exactly, so the test rows are scored both ways.
    """
    folder, config = finished_run(run)
    _check_free(to)
    resident = load_resident(config)
    personal = read_client(folder, client, resident.base, which)
    if any(key.slot == MERGED for key in personal.state.tensors):
        raise UserError(f"{run}: {config.method} merges full matrices into the base; one LoRA cannot hold them")
    examples = _examples(config, resident, client)
    alpha = _mean_weights(personal, resident, examples)
    static = freeze_mixer(personal.state, personal.placement.slots, alpha)
    rank = next(value.shape[0] for key, value in static.tensors.items() if key.factor == A)
    scale = personal.placement.scale
    conv = any(type(layer.base_layer).__name__ == "Conv1D" for layer in resident.model.layers.values())
    with disk_errors(to):
        lora = LoraFolder(resident.base.source, rank, scale * rank, 0.0, conv, config.model.task)
        write_lora(to, {**static.tensors, **static.heads}, STATIC, lora)
    scores = [
        _score(config, resident, examples, replace(personal, state=state, placement=placement))
        for state, placement in (
            (personal.state, personal.placement),
            (static, replace(personal.placement, slots=(STATIC,), mixing=SUM)),
        )
    ]
    return StaticExport(scores[0], scores[1], config.metric, {path: weights[0] for path, weights in alpha.items()})


def freeze_mixer(state: ClientState, slots: tuple[str, ...], alpha: dict[str, list[float]]) -> ClientState:
    """One slot that equals all slots at fixed weights; without weights the slots are added up."""
    tensors = {}
    for path in dict.fromkeys(key.module for key in state.tensors if key.slot in slots):
        weights = alpha.get(path, [1.0] * len(slots))
        tensors[Key(path, STATIC, A)] = torch.cat([state.tensors[Key(path, slot, A)] for slot in slots])
        scaled = [w * state.tensors[Key(path, slot, B)] for slot, w in zip(slots, weights, strict=True)]
        tensors[Key(path, STATIC, B)] = torch.cat(scaled, dim=1)
    return replace(state, tensors=tensors)


def _mean_weights(personal: PersonalModel, resident: Resident, examples: ClientExamples) -> dict[str, list[float]]:
    """Layer path → weight of every slot; empty where the slots are added up."""
    mixing, paths = personal.placement.mixing, list(resident.model.layers)
    if mixing.kind == "sum":
        return {}
    if mixing.kind == "fixed":
        return {path: list(mixing.weights) for path in paths}
    prompts = [example.input for example in examples.train[:_PROMPTS]]
    chosen = load_to_answer(resident.model, [personal.state], [prompts], personal.placement)
    if chosen is not None:
        mean = chosen[0].mean(0).tolist()
        return {path: list(mean) for path in paths}
    weights = mixer_weights(resident.model, [prompts])
    by_slot = [weights.means(slot, 1)[0] for slot in range(len(personal.placement.slots))]
    return {path: [means[i] for means in by_slot] for i, path in enumerate(weights.layers)}


def _examples(config: RunConfig, resident: Resident, client: int) -> ClientExamples:
    federation = load_federation(config.data, config.seed)
    if client not in federation.clients:
        raise UserError(f"{federation.source}: no rows for client {client}")
    mine = replace(federation, clients={client: federation.clients[client]})
    return encode_federation(mine, resident.encoder(config), config.data)[client]


def _score(config: RunConfig, resident: Resident, examples: ClientExamples, personal: PersonalModel) -> float:
    (scored,) = evaluate(
        resident.model,
        resident.base.tokenizer,
        [personal.state],
        {personal.state.client: examples.test},
        personal.placement,
        config=config.evaluation,
    )
    return float(scored.scores[config.metric])


def _check_free(to: Path) -> None:
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to}: exists and is not an empty folder; choose another --out")
