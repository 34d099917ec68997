"""One YAML per run, strictly typed: an unknown key or a value outside its range stops the run before it starts."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from fedalt.compat import as_recorded, settings_today, today
from fedalt.config.data import DataConfig
from fedalt.config.hints import explain
from fedalt.config.section import Named, S, Section, as_list, settings_in
from fedalt.errors import UserError, listed, shortened
from fedalt.files import parse_yaml, read_bytes
from fedalt.registry import (
    METHODS,
    METRICS,
    PARTITIONERS,
    SOURCES,
    TEMPLATES,
    TRACKERS,
    Entry,
    Registry,
    absolute,
    held_plugins,
    import_plugin,
    registered_name,
    section_of,
    sections,
    settings_of,
)


class FlowerConfig(Section):
    """What only a run on Flower has; on one machine none of it matters."""

    wire: Literal["fp32", "bf16", "int8"] = Field(
        "fp32", description="numbers on the wire: exact, halved, or a byte each with a scale per row"
    )
    min_sites: int = Field(2, ge=1, description="fewest sites to start with, and fewest uploads that make a round")
    round_deadline: float = Field(
        3600, gt=0, description="seconds after which a round goes on without the sites that have not answered"
    )
    norm_limit: float = Field(
        100, gt=1, description="an upload longer than this many times the median of its round is set aside"
    )
    allow_two: bool = Field(
        False, description="let a client be told what is made of one other's upload alone, as always with two clients"
    )
    client_gpus: float = Field(
        0, ge=0, description="GPUs that a site of a simulation has (Ray's num_gpus; .5: two share one); 0 for the CPU"
    )


Task = Literal["causal_lm", "sequence_classification", "image_classification"]

NAMED: Mapping[str, Registry[Any]] = {
    "method": METHODS,
    "data.source": SOURCES,
    "data.partition.by": PARTITIONERS,
    "data.template": TEMPLATES,
    "evaluation.metric": METRICS,
    "evaluation.metrics": METRICS,
    "report.trackers": TRACKERS,
}
"""Settings whose value is a registered name, or a list of such; each may be ``FILE.py:Name`` or ``module:Name``."""

_LISTS = ("evaluation.metrics", "report.trackers")


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return name


Device = Annotated[str, AfterValidator(_device)]


_MetricName: TypeAlias = registered_name(METRICS)  # type: ignore[valid-type]
_TrackerName: TypeAlias = registered_name(TRACKERS)  # type: ignore[valid-type]


class ModelConfig(Section):
    """The frozen base model, and what is asked of it."""

    name: str = Field(
        "tiny-base",
        description="Local folder or hub name; tiny-base ships with fedalt, minilm with the extra fedalt[minilm]",
    )
    task: Task = Field(
        "causal_lm", description="generate answers, or classify texts or images: a row's output is its label"
    )
    labels: tuple[str, ...] | None = Field(
        None, description="classes, in the order of the head's outputs; all outputs of training rows when not given"
    )
    pooling: Literal["own", "mean"] = Field(
        "own", description="what a head sees of a row: what the model's own does, or the mean of all tokens' states"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the frozen base")
    device: Device = Field("auto", description="auto, cpu, cuda or cuda:N")
    device_map: Literal["auto"] | None = Field(
        None, description="auto keeps weights that the device has no room for in memory, and then on disk (accelerate)"
    )
    max_memory: dict[int | str, int | str] | None = Field(
        None, description="room for weights with device_map, as accelerate has it, for example {0: 10GiB, cpu: 30GiB}"
    )
    load_in: Literal["8bit", "4bit"] | None = Field(None, description="bitsandbytes quantisation (paper: 8bit)")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    adapter: Annotated[str, AfterValidator(lambda path: str(Path(path).expanduser().absolute()))] | None = Field(
        None, description="folder of a PEFT adapter that is there before the first round"
    )
    adapter_as: Literal["merged", "start"] = Field(
        "merged", description="merged into the frozen base, or where the first LoRA of every client starts"
    )


def _no_distribution(value: Any) -> Any:
    if value == "gaussian":
        raise ValueError("says who starts alike: shared, code_like or per_client; write lora.distribution=gaussian")
    return value


class LoraConfig(Section):
    """Adapters on the frozen base; the same rank for the individual and the RoW LoRA."""

    r: int = Field(8, ge=1, le=65_536, description="rank (paper: 8; 4, 6 and 8 studied)")
    ranks: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] | None = Field(
        None, description="a rank per client, repeated in turn, for methods that allow it; the scale stays alpha/r"
    )
    alpha: float = Field(32, gt=0, description="LoRA numerator; scale is alpha/r on both LoRAs (paper code: 32)")
    dropout: float = Field(0.05, ge=0, lt=1, description="one mask shared by both LoRAs (paper code: .05)")
    targets: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="linear layers with adapters, for example q_proj,v_proj, or all-linear; by architecture when not "
        "given",
    )
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, min_length=1, description="blocks with adapters, by number from 0, for example 0,1,2; all when not given"
    )
    exclude: tuple[str, ...] = Field((), description="linear layers without adapters, although targets names them")
    rslora: bool = Field(False, description="scale alpha over the root of r (rank-stabilised LoRA), not over r")
    init: Annotated[Literal["shared", "code_like", "per_client"], BeforeValidator(_no_distribution)] = Field(
        "shared", description="who starts from the same A and mixer: all, all but client 0 (paper code), nobody"
    )
    distribution: Literal["uniform", "gaussian"] = Field(
        "uniform", description="what A is drawn from: uniform within 1/√d_in (PEFT's default), or normal with sd 1/r"
    )
    mixer_init: Literal["kaiming", "zeros"] = Field("kaiming", description="kaiming (paper code) or exact 0.5/0.5")

    def scale(self, rank: int) -> float:
        """The scale of a LoRA of this rank."""
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


_Decay = Annotated[float, Field(ge=0, lt=1)]


class TrainingConfig(Section):
    """What a client does with its rows in one round."""

    local_epochs: int = Field(5, ge=1, le=10_000, description="epochs per round (paper: 5; 5 and 10 studied)")
    batch_size: int = Field(8, ge=1, le=1_000_000, description="rows per client and step (paper code: 8)")
    lr: float = Field(3e-4, gt=0, description="peak learning rate (paper code: 3e-4)")
    accumulate: int = Field(
        1,
        ge=1,
        le=1_000_000,
        description="batches whose gradients make one step: exactly a batch so many times as large, in less memory",
    )
    max_steps: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="optimiser steps of a client in each round, in place of local_epochs; rows are gone through again",
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="learning rate after warm-up: linear to 0 (paper code), half a cosine to 0, or constant"
    )
    warmup: float = Field(
        0,
        ge=0,
        le=1_000_000,
        description="steps in which the learning rate rises from 0; below 1, a share of the schedule's steps",
    )
    schedule_scope: Literal["round", "run"] = Field(
        "round",
        description="one schedule per round (paper code), or one over all rounds; absent clients skip their part",
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="optimiser of a client (paper code: adamw)")
    betas: tuple[_Decay, _Decay] = Field((0.9, 0.999), description="AdamW's decay of its two moments")
    eps: float = Field(1e-8, gt=0, description="AdamW's addend to the denominator")
    momentum: float = Field(0, ge=0, lt=1, description="SGD's momentum")
    optimizer_state: Literal["reset", "persist"] = Field(
        "reset",
        description="moments start anew in every round (paper code), or a client keeps its own; they are never sent",
    )
    weight_decay: float = Field(
        0.05, ge=0, description="on LoRA and mixer (paper code: .05); with SGD, added to the gradient"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm limit of each client (paper code: 1.0)")
    order: Literal["strict", "bucketed"] = Field(
        "strict", description="seeded row order, or rows of like length together within 16 batches"
    )
    repeat_order: bool = Field(False, description="same row order in every round, as the paper's code does")


class FederationConfig(Section):
    """Rounds, participation, aggregation."""

    rounds: int = Field(20, ge=1, le=1_000_000, description="communication rounds (paper: 20)")
    fraction: float = Field(1.0, gt=0, le=1, description="share of clients sampled per round (paper: 1)")
    weighting: Literal["method", "uniform", "samples"] = Field(
        "method", description="weights of the mean: the method's own rule, 1, or rows per client"
    )
    rest_of_world_participation: Literal["last_known", "participants", "staleness_decay"] = Field(
        "last_known", description="whose uploads form the row when not every client takes part"
    )
    staleness_decay: float = Field(0.9, gt=0, le=1, description="weight factor per round of age (staleness_decay)")
    rest_of_world_delivery: Literal["broadcast", "unicast"] = Field(
        "broadcast", description="one mean for all with subtraction at the client, or each client's own row"
    )
    heads: Literal["private", "shared"] = Field(
        "private", description="classification heads: each client keeps its own, or they are averaged like a LoRA"
    )
    executor: Literal["stacked", "loop"] = Field(
        "stacked", description="a cohort of clients in one forward and backward, or one after another"
    )
    cohort: int | None = Field(
        None, ge=1, description="clients on the model at a time; by rows' length and free memory when not given"
    )
    devices: tuple[Device, ...] | None = Field(
        None,
        min_length=1,
        description="devices of this machine that share the cohorts of a round, for example cuda:0,cuda:1, each with a "
        "base of its own; the one of model.device when not given",
    )
    secure: bool = Field(
        False,
        description="the server sees the sum of all uploads of a round and no single one; numbers go in fixed point",
    )
    secure_min: int = Field(3, ge=2, description="fewest clients in a secure sum")


class PrivacyConfig(Section):
    """Differential privacy of every single training row, in all that a client trains and sends; off unless asked for.

    ``epsilon`` alone finds the noise for all rounds. With ``noise_multiplier``, too, it is where a client stops.
    """

    epsilon: float | None = Field(None, gt=0, description="most that the whole run may tell of any row of a client")
    noise_multiplier: float | None = Field(
        None, gt=0, description="standard deviation of the noise over clip; found from epsilon when not given"
    )
    delta: float | None = Field(None, gt=0, lt=1, description="1 / the client's training rows when not given")
    clip: float = Field(1.0, gt=0, description="longest gradient of a row, in the place of training.max_grad_norm")
    sampling: Literal["poisson"] = Field("poisson", description="every row is in a step with the same probability")
    report: Literal["scores", "all", "none"] = Field(
        "scores",
        description="what leaves a site besides uploads: scores on test and validation rows; losses and tokens of "
        "training rows, too, which no epsilon covers; or neither",
    )

    @property
    def on(self) -> bool:
        """Whether steps are private."""
        return self.epsilon is not None or self.noise_multiplier is not None


class EvaluationConfig(Named):
    """When and how clients are scored on their own rows."""

    every: int = Field(5, ge=1, description="evaluate every N rounds, and always at the end (paper code: 5)")
    points: tuple[Literal["before", "after"], ...] = Field(
        ("before", "after"), description="before and/or after the aggregate is installed (paper code: after)"
    )
    max_new_tokens: int = Field(80, ge=1, description="longest answer (paper code: 80)")
    num_beams: int = Field(1, ge=1, description="1 is greedy (paper code: 4)")
    batch_size: int = Field(32, ge=1, description="prompts per client and generation batch, at most")
    stemmer: bool = Field(True, description="Porter stemmer in ROUGE (paper code: true); changes the scores")
    options: Literal["sum", "mean"] | None = Field(
        None,
        description="also score rows whose instruction lists OPTIONS by each one's likelihood: sum or mean over tokens",
    )
    metric: _MetricName | None = Field(
        None,
        description="the score in tables, and the one that picks the best round on validation rows: the name of a "
        "metric, or FILE.py:Name, or module:Name; rouge1 or accuracy by task when not given",
    )
    metrics: tuple[_MetricName, ...] = Field(
        (), description="more metrics to measure, besides those that fedalt has for the task"
    )
    loss: bool = Field(
        False,
        description="also measure answer_loss: mean nats per token of the reference answers; far less noisy than ROUGE",
    )
    early_stop: int | None = Field(
        None,
        ge=1,
        description="stop after so many evaluations that are no better on validation rows; the best round's adapters "
        "are the ones that clients keep",
    )

    @property
    def measures_loss(self) -> bool:
        """Whether a metric that is asked for reads the loss of the reference answers."""
        asked = (name for name in (self.metric, *self.metrics) if name)
        return self.loss or any(getattr(METRICS.get(name), "reads", None) == "loss" for name in asked)

    @field_validator("points")
    @classmethod
    def _final_point(cls, points: tuple[str, ...]) -> tuple[str, ...]:
        if "after" not in points:
            raise ValueError('must contain "after": the final scores are those after aggregation')
        return points


class ReportConfig(Named):
    """What is shown of a run; none of it changes the run."""

    insight: int = Field(
        0,
        ge=0,
        description="test rows per client for the client matrix and the mixer's weights in report.html; 0: none",
    )
    trackers: tuple[_TrackerName, ...] = Field(
        (),
        description="where else losses, scores, bytes and seconds go: tensorboard, mlflow, wandb, trackio, or "
        "FILE.py:Name",
    )


class RunConfig(Section):
    """Everything that determines a run."""

    method: str = Field("fedalt", description="name of a method, or FILE.py:Name, or module:Name")
    plugins: tuple[str, ...] = Field(
        (), description="Python files and modules that register methods, metrics and other things of your own"
    )
    seed: int = Field(42, ge=0, description="seed of everything random (paper code: 42)")
    out: str | None = Field(None, description="run folder; runs/<method>-<source>-seed<seed> when not given")
    sections: dict[str, SerializeAsAny[Section]] = Field(
        {}, description="settings of single methods and of other registered things; in YAML at the top, by their names"
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    training: TrainingConfig = TrainingConfig()
    federation: FederationConfig = FederationConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()
    flower: FlowerConfig = FlowerConfig()

    @model_validator(mode="before")
    @classmethod
    def _gather_sections(cls, value: Any) -> Any:
        """Sections that have been validated by their own class stand at the top, as in YAML."""
        if not isinstance(value, dict):
            return value
        own = {name: part for name, part in value.items() if name not in cls.model_fields and isinstance(part, Section)}
        rest = {name: part for name, part in value.items() if name not in own}
        return {**rest, "sections": {**rest.get("sections", {}), **own}}

    @field_validator("data", "evaluation", "report")
    @classmethod
    def _know_settings(cls, part: Named, info: ValidationInfo) -> Named:
        """A section that names things knows their settings, which stand beside it."""
        given = info.data.get("sections", {})
        if not given:
            return part
        named = {section_of(entry) for _, entry in _named({str(info.field_name): part.model_dump()}, NAMED.items())}
        return part.knowing({name: given[name] for name in sorted(named & given.keys())})

    @model_serializer(mode="wrap")
    def _spread_sections(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        values = handler(self)
        own = values.pop("sections", {})
        plugins = {"plugins": values.pop("plugins")} if values.get("plugins") else {}
        values.pop("plugins", None)
        return {**values, **plugins, **own}

    def portable(self) -> dict[str, Any]:
        """The settings as JSON for another machine, which has its own files of code."""
        return {key: value for key, value in self.model_dump(mode="json").items() if key != "plugins"}

    def section(self, name: str, kind: type[S]) -> S:
        """The settings of a registered thing: those given, or its defaults."""
        return settings_in(self.sections, name, kind)

    def having(self, section: str, **values: Any) -> RunConfig:
        """The same with other values in a section, which are known to be allowed."""
        return self.model_copy(update={section: getattr(self, section).model_copy(update=values)})

    @model_validator(mode="after")
    def _metrics_of_task(self) -> RunConfig:
        given = self.evaluation
        for key, name in (("metric", given.metric), *(("metrics", name) for name in given.metrics)):
            if name is None:
                continue
            task = getattr(METRICS.get(name), "task", None)
            if task not in (None, "class" if self.classifies else "text"):
                allowed = ", ".join(self._suitable())
                raise ValueError(f"evaluation.{key}: {name} does not suit the task {self.model.task}; use {allowed}")
            if getattr(METRICS.get(name), "reads", None) == "option" and given.options is None:
                raise ValueError(f"evaluation.{key}: {name} needs evaluation.options=sum or mean")
        if given.loss and self.classifies:
            raise ValueError("evaluation.loss: classes have log_loss, which is always measured; leave it out")
        return self

    @model_validator(mode="after")
    def _offloaded_alone(self) -> RunConfig:
        if self.model.max_memory and not self.model.device_map:
            raise ValueError("model.max_memory: this is for model.device_map=auto; leave it out")
        if self.federation.devices and self.model.device_map:
            raise ValueError("model.device_map: with federation.devices every device has a whole base of its own")
        return self

    @model_validator(mode="after")
    def _optimizer_has_its_own(self) -> RunConfig:
        given = self.training
        other = {"adamw": ("momentum",), "sgd": ("betas", "eps")}[given.optimizer]
        unused = next((key for key in other if getattr(given, key) != TrainingConfig.model_fields[key].default), None)
        if unused:
            raise ValueError(f"training.{unused}: training.optimizer={given.optimizer} has none; leave it out")
        if given.warmup > 1 and not given.warmup.is_integer():
            raise ValueError(f"training.warmup: {given.warmup:g} is no number of steps; a share of them is below 1")
        return self

    @model_validator(mode="after")
    def _private_in_full(self) -> RunConfig:
        given, training = self.privacy, self.training
        if not given.on:
            unused = next((key for key, value in given if value != PrivacyConfig.model_fields[key].default), None)
            if unused:
                raise ValueError(f"privacy.{unused}: without privacy.epsilon or privacy.noise_multiplier nothing does")
            return self
        if training.order != "strict" or training.repeat_order:
            key = "repeat_order" if training.repeat_order else "order"
            raise ValueError(f"training.{key}: privacy samples the rows of every step anew; leave it out")
        if given.report == "none" and self.evaluation.early_stop:
            raise ValueError("evaluation.early_stop: privacy.report=none lets no score out; leave one of them out")
        return self

    def _suitable(self) -> Iterator[str]:
        kind = "class" if self.classifies else "text"
        return (entry.name for entry in METRICS.entries() if getattr(entry.value, "task", None) in (None, kind))

    @property
    def classifies(self) -> bool:
        """Whether rows have labels, and not answers to be written."""
        return self.model.task != "causal_lm"

    @property
    def metric(self) -> str:
        """The score in tables."""
        return self.evaluation.metric or ("accuracy" if self.classifies else "rouge1")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out or f"runs/{self.method}-{Path(self.data.source).name}-seed{self.seed}")


def load_config(
    path: Path | None,
    overrides: Sequence[tuple[str, Any]] = (),
    typed: Mapping[str, str] | None = None,
    recorded: bool | Mapping[str, Any] = False,
) -> RunConfig:
    """Read a YAML file, apply dotted keys and values to it, and validate; errors say what was ``typed`` for a key.

    ``recorded`` settings are a run's, which may have been there before some of them were, or are for such a run.
    """
    values = settings_today(read_yaml(path)) if path else {}
    values = as_recorded(values, None if recorded is True else recorded) if recorded else values
    for key, value in overrides:
        _assign(values, *today(key, value))
    return parse_config(values, str(path) if path else "settings", typed)


def parse_config(values: Mapping[str, Any], where: str, typed: Mapping[str, str] | None = None) -> RunConfig:
    """Validate a nested mapping; every problem becomes one line naming its key.

    Plugins are imported, and ``FILE.py:Name`` becomes a registered name, before anything else is looked at.
    """
    values = _with_plugins(settings_today(values))
    known = sections() if values.keys() - RunConfig.model_fields.keys() else {}
    for name in known.keys() & RunConfig.model_fields.keys():
        raise UserError(f'{where}: something registered has settings in a section "{name}", which means something else')
    problems, own = list[Any](), dict[str, Section]()
    for name in (name for name in values if name in known):
        try:
            own[name] = known[name].model_validate({} if values[name] is None else values[name])
        except ValidationError as error:
            problems += [{**one, "loc": (name, *one["loc"])} for one in error.errors()]
    try:
        config = RunConfig.model_validate({key: value for key, value in values.items() if key not in known} | own)
    except ValidationError as error:
        problems += error.errors()
    problems = [one for one in problems if not _counted_without(one)]
    if problems:
        plugins = values.get("plugins")
        code = f"; plugins: {listed(plugins)}" if plugins and _are_texts(plugins) else ""
        lines = (
            explain(problem, RunConfig, where, typed) + (code if problem["type"] == "extra_forbidden" else "")
            for problem in problems
        )
        raise UserError("\n".join(dict.fromkeys(lines)))
    return config


def _counted_without(problem: Any) -> bool:
    """Whether a list is too short only because what is wrong in it does not count."""
    return problem["type"] == "too_short" and bool(len(problem["input"]) >= problem["ctx"]["min_length"])


def parse_received(values: Mapping[str, Any], where: str) -> RunConfig:
    """Validate settings that another machine has sent: they name things, and never bring or point at code.

    What they name must be in this package, or in a file that this machine's administrator holds (``hold_plugins``).
    """
    if values.get("plugins"):
        raise UserError(f"{where}: refused: plugins point at code")
    values, held = settings_today(values), held_plugins()
    for key, registry in _naming(values):
        if any(map(registry.points_at_code, _texts(_at(values, key)))):
            raise UserError(f"{where}: refused: {key} points at code")
    method = values.get("method", "fedalt")
    if method not in METHODS:
        raise UserError(f'{where}: refused: method "{method}" is not held here; --plugin FILE.py names its file')
    return parse_config({**values, "plugins": held} if held else values, where)


def _at(values: Any, dotted: str) -> Any:
    for part in filter(None, dotted.split(".")):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _texts(value: Any) -> list[str]:
    """The names in a setting that holds one, a list of them, or one text with commas."""
    values = as_list(value)
    return [one for one in values if isinstance(one, str)] if isinstance(values, list | tuple) else []


def _with_plugins(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with names in place of references; ``plugins`` has every file and module that is needed."""
    named: dict[str, Any] = copy.deepcopy(dict(values))
    given, plugins = named.get("plugins"), list[str]()
    given = [given] if isinstance(given, str) else given
    if given is not None and not _are_texts(given):
        return named  # the field's own validation says so
    for place in given or ():
        plugins.append(absolute(place))
        import_plugin(plugins[-1])
    for key, registry in _naming(named):
        parent, _, last = key.rpartition(".")
        section = _at(named, parent)
        given = section.get(last) if isinstance(section, dict) else None
        given = as_list(given) if key in _LISTS else given
        if isinstance(given, list | tuple):
            section[last] = [_name(one, registry, plugins) for one in given]
        elif given is not None:
            section[last] = _name(given, registry, plugins)
    return {**named, **({"plugins": tuple(dict.fromkeys(plugins))} if plugins else {})}


def _naming(values: Mapping[str, Any]) -> Iterator[tuple[str, Registry[Any]]]:
    """Keys whose value is a registered name, or a list of such: the package's, and those in sections that are given."""
    yield from NAMED.items()
    yield from _naming_in(values.keys() - RunConfig.model_fields.keys())


def _naming_in(names: Collection[str]) -> Iterator[tuple[str, Registry[Any]]]:
    """Keys of some sections of registered things whose value is itself a registered name."""
    found = sections() if names else {}
    for name in sorted(names & found.keys()):
        for key, field in found[name].model_fields.items():
            yield from ((f"{name}.{key}", one) for one in field.metadata if isinstance(one, Registry))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)


def _name(value: Any, registry: Registry[Any], plugins: list[str]) -> Any:
    """The name in place of a reference, whose file or module joins the plugins."""
    if not isinstance(value, str):
        return value  # the field's own validation says so
    reference = registry.reference(value)
    if reference is None:
        registry.adopt(value, plugins)
        return value
    plugins.append(absolute(reference[0]))
    return registry.name_in(plugins[-1], reference[1])


def used_entries(config: RunConfig) -> Iterator[tuple[str, Entry[Any]]]:
    """Everything registered that the settings name and the numbers depend on, after its kind."""
    values = config.model_dump()
    found = [(registry, entry) for registry, entry in _named(values, NAMED.items()) if registry is not TRACKERS]
    inside = _named(values, _naming_in({section_of(entry) for _, entry in found}))
    return ((registry.kind, entry) for registry, entry in chain(found, inside))


def _named(
    values: Mapping[str, Any], keys: Iterable[tuple[str, Registry[Any]]]
) -> Iterator[tuple[Registry[Any], Entry[Any]]]:
    """Everything registered that some settings name."""
    for key, registry in keys:
        for name in _texts(_at(values, key)):
            if not registry.open or name in registry:
                yield registry, registry.entry(name)


def outside_code(config: RunConfig) -> dict[str, Entry[Any]]:
    """Kind and name of every outside thing that the settings name → what is known of it."""
    return {f"{kind} {entry.name}": entry for kind, entry in used_entries(config) if entry.digest}


def used_code(config: RunConfig) -> dict[str, str]:
    """Kind and name of every outside thing that the numbers of a run depend on → digest of its source."""
    return {thing: str(entry.digest) for thing, entry in outside_code(config).items()}


def used_sections(config: RunConfig) -> set[str]:
    """The sections of everything that the numbers of a run depend on."""
    return {section_of(entry) for _, entry in used_entries(config) if settings_of(entry.value)}


def with_settings(config: RunConfig, settings: Mapping[str, Any], where: str = "settings") -> RunConfig:
    """The same configuration with some dotted keys set, validated; errors start with ``where``."""
    values = config.model_dump()
    for key, value in settings.items():
        _assign(values, *today(key, value))
    return parse_config(values, where)


def parse_override(text: str) -> tuple[str, Any]:
    """Turn ``key.path=value`` into a key and a YAML value."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise UserError(f"--set {shortened(text)}: write key.path=value, for example --set lora.r=4")
    try:
        return key.strip(), parse_yaml(value)
    except (yaml.YAMLError, ValueError):  # the latter from dates and numbers that cannot be
        raise UserError(f"--set {shortened(text)}: the value is not valid YAML") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    try:
        values = parse_yaml(read_bytes(path).decode())
    except (yaml.YAMLError, ValueError) as error:  # the latter from bytes, dates and numbers that cannot be
        mark = getattr(error, "problem_mark", None)
        why = f" ({error.problem})" if isinstance(error, yaml.constructor.ConstructorError) else ""
        raise UserError(f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML{why}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: a configuration is a mapping of keys to values, found {type(values).__name__}")
    return values


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f'"{dotted}": "{parent}" is a value, not a section')
        values = child
    values[last] = value
