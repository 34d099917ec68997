"""What a report shows beyond the log: whose rows are which, LoRAs compared, models on others' rows, the mixer at work.

Written once as ``results/insight.json`` from a finished run's saved clients, so that a report can be drawn again at
any time without model or rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fedalt.config import RunConfig
from fedalt.data.encode import Encoder, Example, token_texts
from fedalt.data.federation import SPLITS, ClientData, Federation, Row
from fedalt.data.load import Rows
from fedalt.errors import UserError
from fedalt.evaluation.evaluate import Evaluation
from fedalt.federation.client import cohort_size, cohorts
from fedalt.files import read_json, write_json
from fedalt.model.peft_files import read_folder
from fedalt.names import INDIVIDUAL, REST_OF_WORLD, A, B, Tensors
from fedalt.runs.client_folder import CONFIG, PersonalModel, client_folder, read_client
from fedalt.runs.folder import RunFolder, kept_scores
from fedalt.runs.setup import Resident, load_resident
from fedalt.training.loop import mixer_weights


def similarity(folder: RunFolder, clients: Sequence[int]) -> tuple[str, list[list[float]]] | None:
    """Cosine similarity of every two clients' products BA over all layers, and the slot it is of.

    The slot is the individual LoRA where there is one, else the first that is not the row; None where there is
    none. A LoRA that is zero is like nothing (0).
    """
    slots = read_json(client_folder(folder, clients[0]) / CONFIG)["slots"]
    slot = INDIVIDUAL if INDIVIDUAL in slots else next((name for name in slots if name != REST_OF_WORLD), None)
    if slot is None:
        return None
    loras = []
    for client in clients:
        tensors = read_folder(client_folder(folder, client), [slot], mixed=False)
        loras.append({key: value for key, value in tensors.items() if key.slot == slot})
    products = inner_products(loras)
    norms = products.diagonal().clamp(min=0).sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0.0)
    values: list[list[float]] = (products * scale * scale[:, None]).clamp(-1, 1).tolist()
    return slot, values


def inner_products(loras: Sequence[Tensors]) -> Float[Tensor, "k k"]:
    """Σ over layers of ⟨B_i A_i, B_j A_j⟩ in fp64, of one slot; ranks may differ.

    ⟨BA, B'A'⟩ = tr((Bᵀ B')(A' Aᵀ)) takes only products r × r: one Gram matrix of all clients' factors per layer.
    """
    total = torch.zeros(len(loras), len(loras), dtype=torch.float64)
    for key in (key for key in loras[0] if key.factor == A):
        a = [lora[key].double() for lora in loras]
        b = [lora[key._replace(factor=B)].double() for lora in loras]
        ranks = torch.tensor([len(one) for one in a])
        owner = torch.nn.functional.one_hot(torch.repeat_interleave(ranks)).double()  # [Σr, k]
        rows, columns = torch.cat(a), torch.cat(b, 1)  # [Σr, d_in], [d_out, Σr]
        total += owner.T @ ((columns.T @ columns) * (rows @ rows.T)) @ owner
    return total


BINS = 20
"""Of the mixer weights' histogram, from 0 to 1."""
_SHADED = 3
"""Rows per client whose tokens are kept with their weights."""


def insight_file(folder: RunFolder) -> Path:
    """Where it is kept."""
    return folder.final_scores.with_name("insight.json")


def read_insight(folder: RunFolder) -> dict[str, Any] | None:
    """What is known of a finished run as it is now; None when nobody looked since its last round."""
    if not folder.final_scores.is_file() or not insight_file(folder).is_file():
        return None
    if folder.changed("results/insight.json"):
        return None
    insight: dict[str, Any] = read_json(insight_file(folder))
    return insight if insight["round"] == kept_scores(folder)["round"] else None


def write_insight(
    folder: RunFolder,
    config: RunConfig,
    clients: Sequence[int],
    count: int,
    *,
    resident: Resident | None = None,
    rows: Rows | None = None,
) -> None:
    """Look at some clients of a finished run, unless that has been done with as many rows."""
    known = read_insight(folder)
    if known and known["rows"] >= count and known["clients"] == [str(client) for client in clients]:
        return
    federation, _ = (rows or Rows()).both(config.data, config.seed)
    missing = [client for client in clients if client not in federation.clients]
    if missing:
        raise UserError(f"{federation.source}: no rows for client {missing[0]} any more")
    alike = similarity(folder, clients)
    insight = {
        "round": kept_scores(folder)["round"],
        "rows": count,
        "clients": [str(client) for client in clients],
        "partition": {str(client): _counts(federation.clients[client], config.classifies) for client in clients},
        "similarity": {"slot": alike[0], "values": alike[1]} if alike else None,
    }
    if count:
        insight |= _with_model(folder, config, federation, clients, count, resident=resident or load_resident(config))
    write_json(insight_file(folder), insight)
    folder.seal(insight_file(folder))


def _counts(data: ClientData, by_label: bool) -> dict[str, dict[str, int]]:
    """Rows by split and label; or category, or task where rows have no category."""

    def kind(row: Row) -> str:
        return row.output if by_label else row.category or row.task

    counts = {split: Counter(map(kind, getattr(data, split))) for split in SPLITS}
    return {split: dict(sorted(count.items())) for split, count in counts.items() if count}


def _with_model(
    folder: RunFolder,
    config: RunConfig,
    federation: Federation,
    clients: Sequence[int],
    rows: int,
    *,
    resident: Resident,
) -> dict[str, Any]:
    encoder = resident.encoder(config)
    chosen = {client: _spread(encoder, federation.clients[client].test, rows) for client in clients}
    matrix: list[list[float]] = []
    alpha: dict[str, Any] = {}
    slot = ""
    for cohort in cohorts(clients, cohort_size(config.federation, len(clients))):
        models = [read_client(folder, client, resident.base) for client in cohort]
        scored = {owner: _answers(resident, models, chosen[owner], config) for owner in clients}
        for k, personal in enumerate(models):
            matrix.append([scored[owner][k].scores[config.metric] for owner in clients])
            if personal.placement.mixed:
                client, slot = personal.state.client, personal.placement.slots[0]
                own = [line["answer"] for line in scored[client][k].lines]
                alpha[str(client)] = _mixer_at_work(resident, personal, chosen[client], own)
    mixer = {"slot": slot, "clients": alpha} if alpha else None
    return {"metric": config.metric, "matrix": matrix, "alpha": mixer}


def _spread(encoder: Encoder, rows: Sequence[Row], count: int) -> list[Example]:
    """So many of the rows that are not too long, evenly spaced, as files are often sorted."""
    examples = [example for row in rows if (example := encoder.example(row))]
    count = min(count, len(examples))
    return [examples[i * len(examples) // count] for i in range(count)]


def _answers(
    resident: Resident, models: Sequence[PersonalModel], rows: Sequence[Example], config: RunConfig
) -> list[Evaluation]:
    """Every model on the same rows, all in one generation batch."""
    states = [personal.state for personal in models]
    return resident.evaluate(states, {state.client: rows for state in states}, models[0].placement, config)


def _mixer_at_work(
    resident: Resident, personal: PersonalModel, rows: Sequence[Example], answers: Sequence[str]
) -> dict[str, Any]:
    """Weights of the first slot while a client's model reads rows and its own answers.

    Returns:
        ``histogram``: tokens × layers by weight, ``BINS`` counts; ``rows``: of the first rows every token's text and
        its mean weight over layers, and how many of them are prompt.
    """
    read = resident.base.tokenizer
    inputs = [
        row.input if row.label >= 0 else (*row.prompt, *read(text, add_special_tokens=False)["input_ids"])
        for row, text in zip(rows, answers, strict=True)
    ]
    resident.model.load([personal.state], personal.placement)
    layers = mixer_weights(resident.model, [inputs]).layers.values()
    weights = torch.stack([alpha[:, 0] for alpha in layers])  # [layers, tokens]
    means = weights.mean(0).split([len(one) for one in inputs])
    shaded = [
        {
            "prompt": len(row.prompt),
            "tokens": [[text, round(a, 3)] for text, a in zip(token_texts(read, one), mine.tolist(), strict=True)],
        }
        for row, one, mine in list(zip(rows, inputs, means, strict=True))[:_SHADED]
        if isinstance(one, tuple)
    ]
    return {"histogram": torch.histc(weights, BINS, 0, 1).int().tolist(), "rows": shaded}
