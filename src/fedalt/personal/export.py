"""Taking one client's model away: its PEFT folders and mixer, one static LoRA, or that LoRA merged into the base.

The mixer looks at every token and cannot be merged exactly. It is frozen at its mean over rows of the client, and the
test rows are scored with either.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fedalt.config import RunConfig
from fedalt.config.data import planted_note
from fedalt.data.encode import ClientExamples, encode_federation
from fedalt.data.load import load_federation
from fedalt.errors import UserError, first_line
from fedalt.evaluation.metrics import metric_of
from fedalt.evaluation.prompt_similarity import load_to_answer
from fedalt.files import new_folder, scratch_folder, write_bytes, write_text
from fedalt.hub import is_hub_name, out_of_reach
from fedalt.model.base import load_base
from fedalt.model.gguf_files import check_gguf, write_gguf
from fedalt.model.layer import SUM, Placement
from fedalt.model.peft_files import LoraFolder, write_lora
from fedalt.model.state import ClientState
from fedalt.names import MERGED, A, B, Key, W
from fedalt.runs.client_folder import PersonalModel, client_folder, read_client
from fedalt.runs.folder import Which, finished_run
from fedalt.runs.setup import Resident, load_resident
from fedalt.seeding import rng
from fedalt.training.loop import mixer_weights

STATIC = "static"
_ROWS = 64
"""Training rows that the mixer is averaged over."""


@dataclass(frozen=True)
class StaticExport:
    """What a static LoRA costs.

    Attributes:
        personal: Score of the personal model on the client's test rows.
        static: Score of the static LoRA on the same rows.
        base: Score of the base alone; None for classifiers, which have no head of their own.
        metric: What the scores are.
        alpha: Layer path → the fixed weight of the first slot.
        notes: What the user should know.
    """

    personal: float
    static: float
    base: float | None
    metric: str
    alpha: dict[str, float]
    notes: tuple[str, ...] = ()


def export_folders(run: Path, client: int, to: Path, which: Which | None = None) -> None:
    """Copy a client's PEFT folders, mixer and configuration, of the round that is kept or of another."""
    source = client_folder(finished_run(run)[0], client, which)
    with _new(to) as folder:
        for path in sorted(source.rglob("*")):
            if path.is_file():
                write_bytes(folder / path.relative_to(source), path.read_bytes())


def export_static(run: Path, client: int, to: Path, which: Which | None = None) -> StaticExport:
    """Write one ordinary LoRA of rank m·r with the mixer frozen at its mean over training rows.

    A = [A_1; …; A_m],   B = [ᾱ_1 B_1, …, ᾱ_m B_m],   alpha·m over rank m·r keeps the scale
    """
    with _new(to) as folder:
        frozen = _Frozen(run, client, which)
        state, scale, resident = frozen.state, frozen.placement.scale, frozen.resident
        if any(key.slot == MERGED for key in state.tensors):
            method = frozen.config.method
            raise UserError(
                f"{run}: {method} merges full matrices into the base; one LoRA cannot hold them; use --merge"
            )
        rank = next(value.shape[0] for key, value in state.tensors.items() if key.factor == A)
        conv = any(_transposed(layer.base_layer) for layer in resident.model.layers.values())
        lora = LoraFolder(resident.base.source, rank, scale * rank, 0.0, conv, frozen.config.model.task)
        cost = frozen.cost()
        model = frozen.config.model
        if model.adapter and model.adapter_as == "merged":
            note = f"the base is one with {model.adapter} merged into it; merge that first, or export with --merge"
            cost = replace(cost, notes=(note,))
        write_lora(folder, {**state.tensors, **state.heads}, STATIC, lora)
        command = _command(run, client, to, "--static", which)
        write_text(folder / "README.md", _card(frozen, cost, command, "its LoRAs as one, for PEFT", "peft"))
    return cost


@dataclass(frozen=True)
class Form:
    """What a merged model is written as.

    Attributes:
        dtype: Of the weights; the run's own when not given.
        gguf: What matrices are kept as in a GGUF file, if there shall be one.
        model: Whether there shall be a model folder of Transformers.
    """

    dtype: str | None = None
    gguf: str | None = None
    model: bool = True

    def __str__(self) -> str:
        """As options."""
        dtype, gguf = (self.dtype and f"--dtype {self.dtype}"), (self.gguf and f"--gguf {self.gguf}")
        return " ".join(filter(None, ("--merge" if self.model else None, dtype, gguf)))


def export_merged(run: Path, client: int, to: Path, which: Which | None = None, *, form: Form = Form()) -> StaticExport:
    """Write the base with the static LoRA merged into it, its tokenizer and a model card: an ordinary model folder."""
    with _new(to) as folder:
        frozen = _Frozen(run, client, which)
        config, base = frozen.config, frozen.resident.base
        if config.classifies and config.model.pooling == "mean":
            raise UserError(
                f"{run}: heads on model.pooling=mean are no part of an ordinary model; export without --merge"
            )
        if form.gguf:
            check_gguf(base.model, base.tokenizer)
        cost = frozen.cost()
        del frozen.resident, base  # two copies of a base are one too many
        base = load_base(config.model.model_copy(update={"load_in": None, "device": "cpu", "device_map": None}))
        merge(base.model, frozen.state, frozen.placement.scale)
        if config.model.load_in:
            note = (
                f"the scores are those on the run's {config.model.load_in} base; this model has the weights before that"
            )
            cost = replace(cost, notes=(note,))
        if form.gguf:
            write_gguf(folder / f"model-{form.gguf}.gguf", base.model, base.tokenizer, form.gguf)
        if form.model:
            base.model.to(getattr(torch, form.dtype or config.model.dtype)).save_pretrained(folder)
            base.tokenizer.save_pretrained(folder)
        command = _command(run, client, to, str(form), which)
        write_text(folder / "README.md", _card(frozen, cost, command, "with its LoRAs merged into the base"))
    return cost


def push(run: Path, client: int, repository: str, form: Form | None, *, which: Which | None, public: bool) -> str:
    """Export to a repository of the hub, which is private unless ``public``; the static LoRA without a ``form``.

    Returns:
        Its address.
    """
    from huggingface_hub import HfApi

    if why := out_of_reach():
        raise UserError(f"--repo: {repository} cannot be written: {why}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        if form is None:
            export_static(run, client, folder, which)
        else:
            export_merged(run, client, folder, which, form=form)
        try:
            api = HfApi()
            place = api.create_repo(repository, private=not public, exist_ok=True).repo_id
            said = f"client {client} of a {finished_run(run)[1].method} run, by fedalt push"
            api.upload_folder(repo_id=place, folder_path=folder, commit_message=said)
        except Exception as error:  # whatever the hub answers: no such owner, no right to write
            raise UserError(f"--repo: {repository} cannot be written ({first_line(error)})") from None
    return f"{api.endpoint}/{place}"


def _command(run: Path, client: int, to: Path, form: str, which: Which | None) -> str:
    command = f"fedalt export {shlex.quote(str(run))} --client {client} --out {shlex.quote(str(to))} {form}"
    return f"{command} --round {which}" if which else command


@torch.no_grad()
def merge(model: Any, state: ClientState, scale: float) -> None:
    """Add ``s·B A``, and what has been merged already, to the base's weights; put the client's heads in place."""
    for path in dict.fromkeys(key.module for key in state.tensors):
        layer = model.get_submodule(path)
        delta = scale * torch.stack([*_deltas(state, path)]).sum(0)
        whole = layer.weight.float() + (delta.T if _transposed(layer) else delta)
        layer.weight.copy_(whole)
    for key, value in state.heads.items():
        model.get_parameter(f"{key.module}.{key.factor}").copy_(value)


def _deltas(state: ClientState, path: str) -> Iterator[torch.Tensor]:
    tensors = state.tensors
    if (down := tensors.get(Key(path, STATIC, A))) is not None:
        yield tensors[Key(path, STATIC, B)].float() @ down.float()
    if (full := tensors.get(Key(path, MERGED, W))) is not None:
        yield full.float()


def freeze_mixer(state: ClientState, slots: tuple[str, ...], alpha: dict[str, list[float]]) -> ClientState:
    """One slot that equals all slots at fixed weights; without weights the slots are added up."""
    tensors = {key: value for key, value in state.tensors.items() if key.slot == MERGED}
    for path in dict.fromkeys(key.module for key in state.tensors if key.slot in slots):
        weights = alpha.get(path, [1.0] * len(slots))
        tensors[Key(path, STATIC, A)] = torch.cat([state.tensors[Key(path, slot, A)] for slot in slots])
        scaled = [w * state.tensors[Key(path, slot, B)] for slot, w in zip(slots, weights, strict=True)]
        tensors[Key(path, STATIC, B)] = torch.cat(scaled, dim=1)
    return replace(state, tensors=tensors)


class _Frozen:
    """A client's model and the same with its mixer frozen."""

    def __init__(self, run: Path, client: int, which: Which | None) -> None:
        self.run, self.config = finished_run(run)
        self.resident = load_resident(self.config)
        self.personal = read_client(self.run, client, self.resident.base, which)
        self.examples = _examples(self.config, self.resident, client)
        self.alpha = _mean_weights(self.config, self.personal, self.resident, self.examples)
        self.state = freeze_mixer(self.personal.state, self.personal.placement.slots, self.alpha)
        self.placement = replace(self.personal.placement, slots=(STATIC,), mixing=SUM)

    def cost(self) -> StaticExport:
        """Score the client's test rows with either, and with the base alone."""
        personal = self._score(self.personal.state, self.personal.placement)
        static = self._score(self.state, self.placement)
        nothing = {key: torch.zeros_like(value) for key, value in self.state.tensors.items()}
        base = None if self.config.classifies else self._score(replace(self.state, tensors=nothing), self.placement)
        first = {path: weights[0] for path, weights in self.alpha.items()}
        return StaticExport(personal, static, base, self.config.metric, first)

    def _score(self, state: ClientState, placement: Placement) -> float:
        (scored,) = self.resident.evaluate([state], {state.client: self.examples.test}, placement, self.config)
        return float(scored.scores[self.config.metric])


def _mean_weights(
    config: RunConfig, personal: PersonalModel, resident: Resident, examples: ClientExamples
) -> dict[str, list[float]]:
    """Layer path → weight of every slot; empty where the slots are added up."""
    mixing, paths = personal.placement.mixing, list(resident.model.layers)
    if mixing.kind == "sum":
        return {}
    if mixing.kind == "fixed":
        return {path: list(mixing.weights) for path in paths}
    order = torch.randperm(len(examples.train), generator=rng(config.seed, STATIC, personal.state.client))
    rows = [examples.train[i] for i in order[:_ROWS].tolist()]
    chosen = load_to_answer(resident.model, [personal.state], [[row.input for row in rows]], personal.placement)
    if chosen is not None:
        mean = chosen[0].mean(0).tolist()
        return {path: list(mean) for path in paths}
    weights = mixer_weights(resident.model, [[row.image or (*row.prompt, *row.answer) for row in rows]])
    by_slot = [weights.means(slot, 1)[0] for slot in range(len(personal.placement.slots))]
    return {path: [means[i] for means in by_slot] for i, path in enumerate(weights.layers)}


def _examples(config: RunConfig, resident: Resident, client: int) -> ClientExamples:
    federation = load_federation(config.data, config.seed)
    if client not in federation.clients:
        raise UserError(f"{federation.source}: no rows for client {client}")
    mine = replace(federation, clients={client: federation.clients[client]})
    return encode_federation(mine, resident.encoder(config), config.data)[client]


def _card(frozen: _Frozen, cost: StaticExport, command: str, what: str, library: str = "transformers") -> str:
    """A model card: base, rows, method, scores, and how it was made."""
    config, run, examples = frozen.config, frozen.run, frozen.examples
    base = f"base_model: {config.model.name}\n" if is_hub_name(config.model.name) and "/" in config.model.name else ""
    scores = {"base alone": cost.base, "personal model": cost.personal, "this model": cost.static}
    metric = metric_of(cost.metric)
    lines = "\n".join(f"| {name} | {metric.text(value)} |" for name, value in scores.items() if value is not None)
    tasks = ", ".join(sorted({example.row.task for example in examples.train if example.row.task}))
    prompt = "" if config.classifies else f"- Prompts: template `{config.data.template}`\n"
    notes = "".join(f"\nNote: {note}.\n" for note in cost.notes)
    if planted := config.data.canaries:
        notes += f"\nNote: {planted_note(planted)}.\n"
    if spent := frozen.personal.privacy:
        notes += (
            f"\nPrivacy: its LoRAs were trained with epsilon {spent['epsilon']:.3g} at delta {spent['delta']:.1e} for "
            f"every training row (DP-SGD, {spent['steps']} steps, noise {spent['noise_multiplier']:.3g} times the clip "
            f"{spent['clip']:g}); the mean of the mixer over training rows, and the scores, are outside of that.\n"
        )
    return f"""---
library_name: {library}
{base}tags: [fedalt, federated-learning, lora]
---

# {config.model.name}, personalised

One client's model of a federation, {what}.

- Base: `{config.model.name}`
- Rows: `{config.data.source}`{f", {tasks}" if tasks else ""}; {len(examples.train)} for training
- Method: `{config.method}`, LoRA of rank {config.lora.r}, {config.federation.rounds} rounds, seed {config.seed}; \
the mixer, if any, is frozen at its mean over training rows
{prompt}- The run: `fedalt run {shlex.quote(str(run.config))}`
- This folder: `{command}`

| {metric.title} on {len(examples.test)} test rows of the client | |
|---|---|
{lines}
{notes}"""


def _transposed(layer: Any) -> bool:
    """Whether a layer is GPT-2's Conv1D, whose weight is ``[d_in, d_out]``."""
    return type(layer).__name__ == "Conv1D"


@contextmanager
def _new(to: Path) -> Iterator[Path]:
    """A folder that is whole or not there; one that is there and empty, perhaps the present one, stays the same."""
    if not to.exists():
        with new_folder(to.absolute()) as folder:
            yield folder
        return
    if not to.is_dir() or any(to.iterdir()):
        raise UserError(f"{to}: exists and is not an empty folder; choose another --out")
    with scratch_folder(to / ".export.tmp") as folder:
        yield folder
        for path in folder.iterdir():
            path.rename(to / path.name)
