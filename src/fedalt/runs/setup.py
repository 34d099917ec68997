"""From a configuration to everything a run needs, with every check that can be made before the first step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from secrets import token_bytes
from statistics import mean
from typing import Any

from torch import Tensor

from fedalt.config import RunConfig, used_code
from fedalt.config.data import DataConfig
from fedalt.data.batches import Noise, steps_of
from fedalt.data.encode import (
    CHAT,
    AnswerEncoder,
    ClientExamples,
    Encoder,
    Example,
    ImageEncoder,
    TextEncoder,
    encode_federation,
    left_out,
    template_text,
)
from fedalt.data.federation import Federation, check_labels, labels_of
from fedalt.data.load import Rows
from fedalt.data.partition import held_out as split_off
from fedalt.data.record import digests, record
from fedalt.errors import UserError, listed
from fedalt.evaluation.choices import options_of
from fedalt.evaluation.evaluate import Evaluation, evaluate
from fedalt.evaluation.metrics import is_latin, metric_of
from fedalt.federation.client import RoundSettings, fitting_cohort
from fedalt.methods.base import Method, trainable
from fedalt.methods.registry import build, configured
from fedalt.model.adapted import AdaptedModel
from fedalt.model.base import Base, load_base, positions
from fedalt.model.classifier import drawn_heads
from fedalt.model.layer import Placement
from fedalt.model.offload import places
from fedalt.model.peft_files import read_plain_lora
from fedalt.model.state import AdapterShape, ClientState, digest, initial_state, start_group
from fedalt.names import B, Key, Tensors
from fedalt.runs.folder import RunFolder
from fedalt.seeding import rng
from fedalt.training.privacy import noise_multiplier


@dataclass(frozen=True)
class RunInfo:
    """What identifies a run, what its server must know, and what its log starts with.

    Attributes:
        base: Fingerprint of the frozen base's weights.
        rows: Fingerprint of all rows, where they are known.
        samples: Training rows per client, for every client of the run.
        shapes: Shape of every tensor that a client may upload.
        shared: Parameters that a client sends per round.
        trainable: Parameters that a client trains.
    """

    config: RunConfig
    method: Method
    base: str
    rows: str
    samples: Mapping[int, int]
    trainers: tuple[int, ...]
    tasks: Mapping[str, str]
    shapes: Mapping[Key, tuple[int, ...]]
    source: str
    shared: int
    trainable: int
    partition: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def clients(self) -> tuple[int, ...]:
        """Ids of all clients."""
        return tuple(self.samples)


NO_VALIDATION = "evaluation.early_stop: no client has validation rows; hold some out with data.validation_rows"


@dataclass(frozen=True)
class Resident:
    """The one base model in memory, wrapped for adapters; runs of several methods share it."""

    base: Base
    model: AdaptedModel

    def encoder(self, config: RunConfig) -> Encoder:
        """What makes examples of rows, by the task."""
        if config.model.task == "image_classification":
            channels = getattr(self.base.model.config, "num_channels", 3)
            return ImageEncoder(self.base.tokenizer, config.model.labels or (), channels, self.model.image_tokens)
        return text_encoder(config, self.base.tokenizer)

    def heads(self, seed: int, client: int) -> dict[Key, Tensor]:
        """What a client's heads start from: the checkpoint's, or drawn where it has none."""
        std = float(getattr(self.base.model.config, "initializer_range", 0.02))
        start = self.model.head_start
        stems = tuple(f"{path}." for path in self.base.new)
        new = {key: value for key, value in start.items() if f"{key.module}.".startswith(stems)}
        return start | drawn_heads(new, std, lambda key: rng(seed, "head", client, str(key)))

    def evaluate(
        self, states: Sequence[ClientState], rows: Mapping[int, Sequence[Example]], placement: Placement, run: RunConfig
    ) -> list[Evaluation]:
        """Score clients' models on rows of each, as a run's settings say."""
        return evaluate(self.model, self.base.tokenizer, states, rows, placement, config=run.evaluation)


def text_encoder(config: RunConfig, tokenizer: Any) -> TextEncoder | AnswerEncoder:
    """What makes examples of rows of text."""
    data, labels = config.data, config.model.labels
    if labels:
        return TextEncoder(tokenizer, labels, data.cutoff)
    return AnswerEncoder(tokenizer, data.template, data.cutoff, data)


@dataclass(frozen=True)
class Experiment:
    """A run that can start.

    Attributes:
        federation: Rows of every client.
        settings: What ``client_round`` needs besides states.
        notes: What the user should know: skipped rows, a federation of two.
        rows: Where the rows came from; other runs may share it.
        start: What every client starts from instead of what is drawn, from ``model.adapter``.
        key: Of sampled rows and noise, where steps are private; a run's own comes from its folder.
    """

    config: RunConfig
    federation: Federation
    examples: dict[int, ClientExamples]
    resident: Resident
    method: Method
    settings: RoundSettings
    notes: tuple[str, ...]
    rows: Rows
    start: Tensors = field(default_factory=dict)
    key: bytes = field(default_factory=lambda: token_bytes(32), repr=False)

    @property
    def shape(self) -> AdapterShape:
        """Shapes of one client's adapters."""
        return self.method.shape

    @property
    def rows_digest(self) -> str:
        """Fingerprint of all rows and of who has them."""
        return hashlib.sha256(json.dumps(digests(self.federation)).encode()).hexdigest()

    @property
    def base_digest(self) -> str:
        """Fingerprint of the base, and of the adapter that clients start from."""
        base = self.resident.base.sha256
        return hashlib.sha256(f"{base} {digest(self.start)}".encode()).hexdigest() if self.start else base

    @property
    def info(self) -> RunInfo:
        """What the rounds know of this run."""
        config, rows = self.config, self.federation.clients
        some = config.data.held_out or config.data.partition.file
        held_out = self.rows.both(config.data, config.seed)[1] if some else None
        return RunInfo(
            config,
            self.method,
            self.base_digest,
            self.rows_digest,
            {client: len(mine.train) for client, mine in self.examples.items()},
            self.trainers,
            {str(client): data.train[0].task for client, data in rows.items()},
            self.upload_shapes,
            self.federation.source,
            self.sent,
            self.trained,
            record(config.data, config.seed, self.federation, held_out),
            self.notes,
        )

    @property
    def fitting_cohort(self) -> int:
        """Clients on the model at a time, by the length of their rows and the memory that is free now."""
        lengths = [mean(map(len, mine.train)) for mine in self.examples.values()]
        whole = self.shape.size() + self.head_size
        if self.config.training.optimizer_state == "persist":
            whole += 2 * self.trained  # two moments, in the state before the round and in the one after it
        return fitting_cohort(self.resident.model, lengths, self.config.training.batch_size, whole, self.trained)

    @property
    def trained(self) -> int:
        """Parameters that a client trains."""
        return trainable(self.method) + self.head_size

    def with_cohort(self, size: int) -> Experiment:
        """The same with so many clients on the model at a time."""
        return replace(self, config=self.config.having("federation", cohort=size))

    def initial_state(self, client: int) -> ClientState:
        """What a client starts from, made from the seed."""
        lora, seed = self.config.lora, self.config.seed
        rank = self.method.rank_of(client)
        state = initial_state(
            self.shape,
            client,
            seed,
            lora.init,
            lora.mixer_init,
            frozen=self.method.frozen,
            rank=rank,
            distribution=lora.distribution,
        ).with_tensors(self.start)
        return replace(state, heads=self.resident.heads(seed, start_group(lora.init, client)))

    @property
    def upload_shapes(self) -> dict[Key, tuple[int, ...]]:
        """Shape of every tensor that a client may send; the largest where ranks are unequal."""
        shapes: dict[Key, tuple[int, ...]] = {k: v for k, v in self.shape.shapes().items() if self.method.shares(k)}
        if shapes and self.settings.shares_heads:
            shapes |= {key: tuple(value.shape) for key, value in self.resident.model.head_start.items()}
        return shapes

    @property
    def sent(self) -> int:
        """Parameters that a client sends per round."""
        return sum(map(prod, self.upload_shapes.values()))

    @property
    def head_size(self) -> int:
        """Parameters of a client's heads."""
        return sum(value.numel() for value in self.resident.model.head_start.values())

    def personalised(self, states: Sequence[ClientState]) -> list[ClientState]:
        """A cohort's models that answer, made from what clients keep."""
        split = "validation" if self.method.held_out else "train"
        rows = {state.client: getattr(self.examples[state.client], split) for state in states}
        return self.method.personalise(self.resident.model, states, rows, self.settings.answering)

    def in_folder(self, folder: RunFolder) -> Experiment:
        """The same with the key of a run's folder, where steps are private."""
        return replace(self, key=folder.secret()) if self.config.privacy.on else self

    def noise(self, client: int) -> Noise | None:
        """What makes a client's steps private, for all rounds, if they are."""
        privacy, training, rows = self.config.privacy, self.config.training, len(self.examples[client].train)
        if not privacy.on:
            return None
        size = training.batch_size * training.accumulate
        rate, delta = min(1.0, size / rows), privacy.delta or min(1 / rows, 0.5)
        steps = steps_of(rows, training) * self.method.private_phases
        multiplier = privacy.noise_multiplier or noise_multiplier(privacy.epsilon or 0.0, rate, steps, delta)
        return Noise(self.key, rate, rate * rows, privacy.clip, multiplier, delta, privacy.epsilon)

    @property
    def trainers(self) -> tuple[int, ...]:
        """Clients that may train: everybody, or the first in the name of all."""
        return self.federation.ids[:1] if self.method.centralised else self.federation.ids

    def training_rows(self, client: int) -> Sequence[Example]:
        """What a client trains on: its own rows, or everybody's."""
        if self.method.centralised:
            return [row for mine in self.examples.values() for row in mine.train]
        return self.examples[client].train


def load_resident(config: RunConfig) -> Resident:
    """Load the base model and wrap its targets."""
    base = load_base(config.model)
    how, lora = config.model, config.lora
    model = AdaptedModel(
        base.model,
        targets=lora.targets,
        gradient_checkpointing=how.gradient_checkpointing,
        heads=base.heads,
        pooling=how.pooling,
        layers=lora.layers,
        exclude=lora.exclude,
    )
    if how.task == "causal_lm" and not model.causal:
        kind = type(base.model).__name__
        raise UserError(f"model.name: in {kind} a token sees those after it, so it cannot learn to write answers")
    return Resident(base, model)


def load_rows(config: RunConfig, rows: Rows) -> tuple[RunConfig, Federation]:
    """The rows; and the settings, with the classes of training rows where rows are classified and none are set."""
    if config.classifies and config.data.canaries:
        raise UserError("data.canaries: a canary's secret is an answer in text, and classifiers write none")
    federation, held_out = rows.both(config.data, config.seed)
    if not config.classifies:
        return config, federation
    if config.model.labels is not None:
        check_labels(config.model.labels, federation, held_out)
        return config, federation
    return config.having("model", labels=labels_of(federation, held_out)), federation


def prepare(
    config: RunConfig,
    resident: Resident | None = None,
    federation: Federation | None = None,
    clients: int | None = None,
    rows: Rows | None = None,
) -> Experiment:
    """Check the method, read the rows, load the base, tokenise."""
    config = configured(config, config.method)
    rows = rows or Rows()
    if federation is None:
        config, federation = load_rows(config, rows)
    resident = resident or load_resident(config)
    config, shortened = read_settings(config, federation, resident.base.model, resident.base.tokenizer)
    examples = encode_federation(federation, _encoder(rows, resident, config), config.data)
    if config.evaluation.early_stop and clients is None and not any(mine.validation for mine in examples.values()):
        raise UserError(NO_VALIDATION)  # a site knows its own rows only
    if metric_of(config.metric).reads == "option":
        for client, mine in examples.items():
            if not any(options_of(example.row.instruction) for example in mine.test):
                text = f"{config.metric} asked for, but no test row of client {client} lists OPTIONS"
                raise UserError(f"evaluation.metric: {text}")
    method = build(config, clients or len(federation.clients), resident.model.layer_sizes)
    examples, kept = _held_out(examples, method.held_out, config.seed)
    method.rank_of(0)  # refuses ranks where there is no rule for them
    settings = RoundSettings(method, config.training, method.centralised or config.federation.heads == "shared")
    notes = (
        *federation.notes[:1],
        *filter(None, [places(resident.base.model)]),
        *shortened,
        *_padding(config, resident.model),
        *_searching(config, resident.base.model),
        *_notes(config, federation, examples, method),
        *kept,
    )
    start = _adapter_start(config, method) if config.model.adapter_as == "start" else {}
    experiment = Experiment(config, federation, examples, resident, method, settings, notes, rows, start)
    return replace(experiment, notes=(*notes, *_private(experiment)))


def _held_out(
    examples: dict[int, ClientExamples], share: float, seed: int
) -> tuple[dict[int, ClientExamples], tuple[str, ...]]:
    """The examples with a share of training rows as validation rows, for clients that have none, and a note."""
    lacking = [client for client, mine in examples.items() if share and not mine.validation and len(mine.train) > 1]
    made = {}
    for client in lacking:
        mine = examples[client]
        train, kept = split_off([example.row.output for example in mine.train], share, seed, client)
        made[client] = replace(
            mine, train=tuple(mine.train[i] for i in train), validation=tuple(mine.train[i] for i in kept)
        )
    note = f"{share:g} of the training rows of {len(lacking)} clients are held out: the method chooses on them"
    return {**examples, **made}, (note,) if lacking else ()


def _adapter_start(config: RunConfig, method: Method) -> Tensors:
    """The tensors of ``model.adapter`` as those of the first LoRA that is no mean of others', at this run's scale."""
    if config.model.adapter is None:
        raise UserError("model.adapter_as: start, but no model.adapter is given")
    slot = next(name for name in method.slot_names if name not in method.frozen)
    rank, scale, tensors = read_plain_lora(Path(config.model.adapter))
    if method.client_ranks is not None or rank != method.ranks[slot]:
        own = "clients' own ranks" if method.client_ranks else f"{method.ranks[slot]} of {slot}"
        raise UserError(f"model.adapter: {config.model.adapter} has rank {rank}, which is not {own}; set lora.r={rank}")
    outside = next((module for module, _ in tensors if module not in method.layers), None)
    if outside:
        raise UserError(
            f"model.adapter: {config.model.adapter} adapts {outside}, which is no target here; lora.targets"
        )
    found = {Key(module, slot, factor): value for (module, factor), value in tensors.items()}
    shapes = method.shape.shapes()
    wrong = next((key for key, value in found.items() if tuple(value.shape) != shapes[key]), None)
    if wrong:
        raise UserError(f"model.adapter: {wrong} is {tuple(found[wrong].shape)}, and {shapes[wrong]} here")
    return {key: value * (scale / method.scale) if key.factor == B else value for key, value in found.items()}


def _encoder(rows: Rows, resident: Resident, config: RunConfig) -> Encoder:
    """What makes examples of rows; runs that read them alike share it."""
    name = config.data.template
    template = None if config.classifies else (name, template_text(name), used_code(config).get(f"template {name}"))
    settings = (
        config.model.task,
        config.model.labels,
        template,
        config.data.own,
        config.data.cutoff,
        config.data.boundary,
    )
    return rows.encoder(resident.base.tokenizer, settings, lambda: resident.encoder(config))


def read_settings(
    config: RunConfig, federation: Federation, model: Any, tokenizer: Any
) -> tuple[RunConfig, tuple[str, ...]]:
    """The settings by which rows become tokens, as they hold for a model and for these rows, with notes."""
    if config.model.task == "image_classification":
        return config, ()
    config, shortened = _fit_positions(config, model, tokenizer)
    config, talked = _conversing(config, federation, tokenizer)
    return config, (*shortened, *talked)


def _fit_positions(config: RunConfig, model: Any, tokenizer: Any) -> tuple[RunConfig, tuple[str, ...]]:
    """Lower the cut-off so that a prompt of that length and its answer fit the model's positions."""
    limit = positions(model, tokenizer if config.classifies else None)
    longest = 0 if config.classifies else config.evaluation.max_new_tokens
    if limit is None or config.data.cutoff + longest <= limit:
        return config, ()
    cutoff = limit - longest
    if cutoff < 1:
        raise UserError(f"evaluation.max_new_tokens: {longest} fills the model's {limit} positions, no prompt fits")
    note = f"data.cutoff lowered from {config.data.cutoff} to {cutoff}: the model has {limit} positions"
    return config.having("data", cutoff=cutoff), (note,)


def _conversing(config: RunConfig, federation: Federation, tokenizer: Any) -> tuple[RunConfig, tuple[str, ...]]:
    """Conversations go through the tokenizer's own template, if it has one, where no other one is asked for."""
    rows = (row for data in federation.clients.values() for row in (*data.train, *data.test))
    if config.classifies or config.data.template == CHAT or not any(row.turns for row in rows):
        return config, ()
    name, default = config.data.template, DataConfig.model_fields["template"].default
    if name == default and getattr(tokenizer, "chat_template", None):
        note = "conversations: data.template=chat, the tokenizer's own; data.template=alpaca or a file lays turns out"
        return config.having("data", template=CHAT), (note,)
    return config, (f"conversations: data.template={name} lays out every question, one after another",)


def _script(config: RunConfig, examples: Mapping[int, ClientExamples]) -> tuple[str, ...]:
    """A note on references that Google's ROUGE cannot read."""
    found = [client for client, mine in examples.items() if not all(is_latin(e.row.output) for e in mine.test)]
    if config.classifies or not found:
        return ()
    who = listed([f"client {client}" for client in found], 5)
    return (f"answers of {who} are not in Latin letters: ROUGE counts words of any script, characters of CJK and Thai",)


def _padding(config: RunConfig, model: AdaptedModel) -> tuple[str, ...]:
    if not model.pads:
        return ("rows of unlike length are read apart: padding changes what this model makes of them",)
    if not model.unpacked:
        return ()
    advice = "" if config.training.order == "bucketed" else "; training.order=bucketed wastes less"
    return (f"rows are padded, not packed, on this model: {model.unpacked}{advice}",)


_NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0} | dict.fromkeys(
    ("bad_words_ids", "suppress_tokens", "min_new_tokens", "sequence_bias", "exponential_decay_length_penalty")
)
"""What changes scores of next tokens, where it is not so."""


def _searching(config: RunConfig, model: Any) -> Iterator[str]:
    """What a model's folder says of how answers are found: ``generation_config.json``."""
    if config.classifies:
        return
    said = model.generation_config
    changed = {name: getattr(said, name, None) for name in _NEUTRAL}
    named = [f"{name}={value}" for name, value in changed.items() if value not in (None, _NEUTRAL[name])]
    if named:
        yield f"the model's folder sets {', '.join(named)}: held to, by Transformers' own search, which is slower"
    if (count := getattr(said, "num_return_sequences", None)) not in (None, 1):
        yield f"the model's folder asks for num_return_sequences={count}: one answer is given and scored"


def _notes(
    config: RunConfig, federation: Federation, examples: dict[int, ClientExamples], method: Method
) -> tuple[str, ...]:
    notes = [*federation.notes[1:], *left_out(examples, config.data.cutoff), *_script(config, examples)]
    notes += method.remarks()
    if config.training.max_steps:
        notes.append(f"training.max_steps={config.training.max_steps} stands in place of training.local_epochs")
    if method.leave_one_out and method.clients == 2:
        notes.append("two clients: each one's RoW LoRA is the other client's individual LoRA, nothing is hidden")
    if method.leave_one_out and method.clients == 1:
        notes.append("one client: there is no rest of the world, so the mixer is bypassed and this equals local")
    return tuple(notes)


def _private(experiment: Experiment) -> Iterator[str]:
    """Notes on a run whose steps are private."""
    config, method = experiment.config.privacy, experiment.method
    found = [noise for client in experiment.examples if (noise := experiment.noise(client))]
    if not found:
        return
    if not experiment.resident.model.pads:
        raise UserError(
            "privacy: rows of unlike length are read apart on this model; use another, or leave privacy out"
        )
    deltas, sigmas = sorted({n.delta for n in found}), sorted({n.multiplier for n in found})
    most = f"epsilon at most {config.epsilon:g} a client" if config.epsilon else "no limit of epsilon"
    yield (
        f"privacy: {most}, delta {_range(deltas, '.1e')}, noise {_range(sigmas, '.3g')} times privacy.clip="
        f"{config.clip:g}, which stands in place of training.max_grad_norm; rows are sampled (Poisson)"
    )
    if config.report == "all":
        yield "privacy.report=all: losses and tokens of training rows are reported, and no epsilon covers them"
    if type(method).personalise is not Method.personalise:
        yield f"privacy: covers what is sent; for personal models {method.name} looks at rows again, without noise"


def _range(values: Sequence[float], form: str) -> str:
    ends = [f"{value:{form}}" for value in dict.fromkeys((values[0], values[-1]))]
    return " to ".join(ends)


class Bases:
    """The base model in memory, loaded anew only for settings that ask for another."""

    def __init__(self) -> None:
        self._wanted: Any = None
        self._resident: Resident | None = None

    def of(self, config: RunConfig) -> Resident:
        """The base of a run, wrapped for its targets."""
        wanted = (config.model, config.lora.targets, config.lora.layers, config.lora.exclude)
        if self._resident is None or wanted != self._wanted:
            self._resident = None  # two bases at a time may not fit
            self._resident, self._wanted = load_resident(config), wanted
        return self._resident
