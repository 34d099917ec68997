"""From a configuration to everything a run needs, with every check that can be made before the first step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

from fedalt.config import RunConfig
from fedalt.data.encode import ClientExamples, Example, encode_federation
from fedalt.data.load import load_federation
from fedalt.data.record import digests
from fedalt.data.rows import Federation
from fedalt.errors import UserError
from fedalt.federation.client import RoundSettings
from fedalt.federation.cohort import fitting_cohort
from fedalt.methods.base import Method
from fedalt.methods.registry import configured, get_method
from fedalt.model.adapted import AdaptedModel
from fedalt.model.base import Base, load_base, positions
from fedalt.model.state import AdapterShape, ClientState, initial_state

_MOST_NOTES = 20
"""Clients whose skipped rows get a note of their own."""


@dataclass(frozen=True)
class Resident:
    """The one base model in memory, wrapped for adapters; runs of several methods share it."""

    base: Base
    model: AdaptedModel


@dataclass(frozen=True)
class Experiment:
    """A run that can start.

    Attributes:
        config: Its configuration.
        federation: Rows of every client.
        examples: The same in tokens.
        resident: The base model.
        method: The method, for this number of clients.
        shape: Shapes of one client's adapters.
        settings: What ``client_round`` needs besides states.
        notes: What the user should know: skipped rows, a federation of two.
    """

    config: RunConfig
    federation: Federation
    examples: dict[int, ClientExamples]
    resident: Resident
    method: Method
    shape: AdapterShape
    settings: RoundSettings
    notes: tuple[str, ...]

    @property
    def rows_digest(self) -> str:
        """Fingerprint of all rows and of who has them."""
        return hashlib.sha256(json.dumps(digests(self.federation)).encode()).hexdigest()

    @property
    def fitting_cohort(self) -> int:
        """Clients on the model at a time, by the length of their rows and the memory that is free now."""
        lengths = [mean(map(len, mine.train)) for mine in self.examples.values()]
        return fitting_cohort(self.resident.model, lengths, self.config.training.batch_size)

    def with_cohort(self, size: int) -> Experiment:
        """The same with so many clients on the model at a time."""
        federation = self.config.federation.model_copy(update={"cohort": size})
        return replace(self, config=self.config.model_copy(update={"federation": federation}))

    def initial_state(self, client: int) -> ClientState:
        """What a client starts from, made from the seed."""
        lora, seed = self.config.lora, self.config.seed
        rank = self.method.rank_of(client)
        return initial_state(self.shape, client, seed, lora.init, lora.mixer_init, self.method.frozen, rank)

    def personalised(self, states: Sequence[ClientState]) -> list[ClientState]:
        """A cohort's models that answer, made from what clients keep."""
        rows = {state.client: self.examples[state.client].train for state in states}
        return self.method.personalise(self.resident.model, states, rows, self.settings.answering)

    @property
    def trainers(self) -> tuple[int, ...]:
        """Clients that may train: everybody, or the first in the name of all."""
        return self.federation.ids[:1] if self.method.pooled else self.federation.ids

    def training_rows(self, client: int) -> Sequence[Example]:
        """What a client trains on: its own rows, or everybody's."""
        if self.method.pooled:
            return [row for mine in self.examples.values() for row in mine.train]
        return self.examples[client].train


def load_resident(config: RunConfig) -> Resident:
    """Load the base model and wrap its targets.

    Raises:
        UserError: See ``load_base`` and ``find_targets``.
    """
    base = load_base(config.model)
    return Resident(base, AdaptedModel(base.model, config.lora.targets, config.model.gradient_checkpointing))


def prepare(config: RunConfig, resident: Resident | None = None) -> Experiment:
    """Check the method, read the rows, load the base, tokenise.

    Raises:
        UserError: Anything that is wrong with the settings, the rows or the model.
    """
    config = configured(config, config.method)
    federation = load_federation(config.data, config.seed)
    resident = resident or load_resident(config)
    config, shortened = _fit_positions(config, resident)
    examples = encode_federation(federation, resident.base.tokenizer, config.data)
    method = get_method(config.method)(len(federation.clients), config)
    method.rank_of(0)  # refuses ranks where there is no rule for them
    shape = method.shape(config.lora.r, resident.model.layer_sizes)
    settings = RoundSettings(method, config.lora, config.training)
    notes = (*shortened, *_notes(config, federation, examples, method))
    return Experiment(config, federation, examples, resident, method, shape, settings, notes)


def _fit_positions(config: RunConfig, resident: Resident) -> tuple[RunConfig, tuple[str, ...]]:
    """Lower the cut-off so that a prompt of that length and its answer fit the model's positions."""
    limit, longest = positions(resident.base.model), config.evaluation.max_new_tokens
    if limit is None or config.data.cutoff + longest <= limit:
        return config, ()
    cutoff = limit - longest
    if cutoff < 1:
        raise UserError(f"evaluation.max_new_tokens: {longest} fills the model's {limit} positions, no prompt fits")
    note = f"data.cutoff lowered from {config.data.cutoff} to {cutoff}: the model has {limit} positions"
    return config.model_copy(update={"data": config.data.model_copy(update={"cutoff": cutoff})}), (note,)


def _notes(
    config: RunConfig, federation: Federation, examples: dict[int, ClientExamples], method: Method
) -> tuple[str, ...]:
    notes, short = list(federation.notes), list[str]()
    for client, mine in examples.items():
        skipped = ", ".join(f"{count} {split}" for split, count in mine.skipped.items() if count)
        if skipped:
            short.append(
                f"client {client}: {skipped} rows skipped, their prompt fills data.cutoff={config.data.cutoff}"
            )
    notes += short[:_MOST_NOTES]
    if len(short) > _MOST_NOTES:
        notes.append(f"rows of {len(short) - _MOST_NOTES} more clients skipped, too")
    if method.leave_one_out and len(federation.clients) == 2:
        notes.append("two clients: each one's row LoRA is the other client's individual LoRA, nothing is hidden")
    if method.leave_one_out and len(federation.clients) == 1:
        notes.append("one client: there is no rest of the world, so the mixer is bypassed and this equals local")
    return tuple(notes)
