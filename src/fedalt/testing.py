"""``check_method`` holds anybody's method to what every method here keeps, on a tiny random model and made-up rows.

    from fedalt.testing import check_method

    def test_my_method():
        check_method(MyMethod(mu=0.1))

It takes seconds, downloads nothing and needs no test framework: the first property that fails is an AssertionError that
says which one, and at which client and tensor. ``TinyFederation`` is the loop behind it, for tests of one's own.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fedalt.config import FederationConfig, LoraConfig, RunConfig, TrainingConfig, with_settings
from fedalt.data.batches import Plan, plan_round
from fedalt.data.encode import Example
from fedalt.data.federation import Row
from fedalt.federation.client import ClientResult, RoundSettings, cohort_size, run_clients
from fedalt.federation.server import Server
from fedalt.methods.base import Message, Method
from fedalt.methods.registry import configured, get_method
from fedalt.model.adapted import AdaptedModel
from fedalt.model.batch_layout import BatchLayout
from fedalt.model.layer import Placement
from fedalt.model.state import AdapterShape, ClientState, initial_state
from fedalt.names import Tensors
from fedalt.registry import section_of
from fedalt.runs.checkpoint import Checkpoint, load_checkpoint

VOCAB, HIDDEN, LAYERS = 64, 32, 2
PAD = 0
RANK = 4
SCALE = 2.0
WIDE = 0.2
"""Standard deviation of random base weights: ten times the usual, so that gradients are far from zero."""
LORA = LoraConfig(r=RANK, alpha=SCALE * RANK, dropout=0.0)

# ------------------------------------------------------------------------------------------------- a tiny federation


def tiny_model() -> LlamaForCausalLM:
    """A Llama of two layers with random weights, always the same; the global random stream is set to 0."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=WIDE,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model: LlamaForCausalLM = LlamaForCausalLM(config).float().eval()
    return model


def example(prompt: int, answer: int, seed: int) -> Example:
    """A row of random tokens, none of them special."""
    draw = random.Random(seed)
    ids = tuple(draw.randrange(3, VOCAB) for _ in range(prompt + answer))
    return Example(ids[:prompt], ids[prompt:], Row("", ""))


def examples(count: int, seed: int, longest: int = 9) -> tuple[Example, ...]:
    """Rows of many lengths."""
    draw = random.Random(seed)
    return tuple(example(draw.randint(3, longest), draw.randint(1, 4), 1000 * seed + i) for i in range(count))


def training(**changes: Any) -> TrainingConfig:
    """Settings under which a round takes a few steps."""
    return TrainingConfig(**({"lr": 5e-3, "batch_size": 4, "local_epochs": 2} | changes))


def start_states(
    method: Method,
    shape: AdapterShape,
    clients: Iterable[int],
    init: Literal["shared", "code_like", "per_client"] = "shared",
) -> list[ClientState]:
    """What clients have before the first round."""
    return [
        initial_state(shape, client, 7, init, "kaiming", frozen=method.frozen, rank=method.rank_of(client))
        for client in clients
    ]


def round_settings(method: Method, config: TrainingConfig, dropout: float = 0.0) -> RoundSettings:
    """What is the same for all clients and rounds."""
    method = copy(method)
    method.config = with_settings(method.config, {"lora.dropout": dropout})
    return RoundSettings(method, config)


def plans_of(
    rows: Mapping[int, Sequence[Example]], config: TrainingConfig, round_: int = 1, seed: int = 5, phase: int = 0
) -> list[Plan]:
    """Each client's steps in one phase of a round."""
    return [plan_round(mine, client, config, seed, round_, phase=phase) for client, mine in rows.items()]


class TinyFederation:
    """A federation in memory: the rounds of a run, by the run's own code, without files and scores.

    Args:
        model: Where clients train.
        method: A bound method.
        rows: Rows of every client.
        config: What a client does in a round.
        federation: Settings of the server.
        dropout: Of adapters.
        states: Where clients start; as in a run when not given.
        executor: Settings of how clients share the model, say ``cohort=2`` or ``executor="loop"``.
    """

    def __init__(
        self,
        model: AdaptedModel,
        method: Method,
        rows: Mapping[int, Sequence[Example]],
        config: TrainingConfig,
        *,
        federation: FederationConfig | None = None,
        dropout: float = 0.0,
        states: Sequence[ClientState] = (),
        **executor: Any,
    ) -> None:
        self.model, self.method, self.rows = model, copy(method), rows
        self.method.layers = model.layer_sizes
        self.settings = round_settings(self.method, config, dropout)
        shape = self.method.shape
        self.states = {s.client: s for s in states or start_states(self.method, shape, rows)}
        shared = {key: size for key, size in shape.shapes().items() if self.method.shares(key)}
        self.server = Server(
            self.method, federation or FederationConfig(), {c: len(mine) for c, mine in rows.items()}, shared
        )
        self.uploads: dict[int, Tensors] = {}
        self._executor = FederationConfig(**executor)

    def train(self, round_: int, clients: Sequence[int], told: Mapping[int, Message]) -> list[ClientResult]:
        """The clients' part of a round; nothing here changes by it."""
        here = {client: self.rows[client] for client in clients}
        phases = range(len(self.method.phases(round_)))
        plans = [plans_of(here, self.settings.training, round_, phase=phase) for phase in phases]
        mine = dict(zip(here, zip(*plans, strict=True), strict=True)) if plans else dict.fromkeys(here, ())
        size = cohort_size(self._executor, len(here))
        known = (self.model, tuple(here), self.states, told, mine.__getitem__)
        return list(run_clients(*known, settings=self.settings, round_=round_, cohort=size))

    def deliver(self, round_: int, results: Sequence[ClientResult]) -> None:
        """The server's part of a round."""
        arrived = {result.state.client: result.upload for result in results if result.upload}
        self.uploads |= arrived
        self.server.receive(arrived, self.uploads.__getitem__, round_)
        self.states |= {result.state.client: result.state for result in results}

    def round(self, round_: int, clients: Sequence[int] | None = None) -> list[ClientResult]:
        """A whole round, of all clients or some."""
        chosen = tuple(self.rows if clients is None else clients)
        results = self.train(round_, chosen, dict(self.server.messages(chosen)))
        self.deliver(round_, results)
        return results


def distance(one: Tensors, other: Tensors) -> float:
    """Largest absolute difference.

    Raises:
        AssertionError: The keys are not the same.
    """
    if one.keys() != other.keys():
        raise AssertionError(f"other tensors: {sorted(map(str, one.keys() ^ other.keys()))}")
    return max(float((value - other[key]).abs().max()) for key, value in one.items())


# ------------------------------------------------------------------------------------------------------- the checks

ROWS = {client: examples(count, seed=client) for client, count in enumerate((7, 10, 3))}
PRESENT = ((0, 1), (0, 1, 2), (1, 2), (0, 1, 2))
"""Who takes part in each round: client 2 comes late, client 0 misses a round and comes back."""
EXECUTORS: Mapping[str, Mapping[str, Any]] = {
    "one client at a time": {"executor": "loop"},
    "all clients at once": {},
    "two clients at a time": {"cohort": 2},
}
STOP = 2
"""The round after which the resumed run was stopped."""
History = list[list[ClientResult]]


def check_method(
    method: type[Method] | Method | str,
    *,
    settings: Mapping[str, Any] | None = None,
    model: Callable[[], Any] = tiny_model,
    tolerance: float = 1e-4,
) -> None:
    """Check a method as all methods of this package are checked, through four rounds with a server in between.

    - Clients that share the model, all or two at a time, end where clients that take turns end.
    - The same seed gives the same bits, whatever the global random stream says.
    - A run that is stopped and resumed from its files ends bitwise the same: a method keeps nothing in itself.
    - Clients may miss rounds, and come late.
    - An upload has what ``shares`` says, all of it, in the shapes that bytes are counted by, and nothing else.
    - A round changes neither the states nor the messages that go into it, nor the base model.
    - A client whose numbers are not finite keeps its state, sends nothing and harms nobody.
    - What a client does reaches others through the server alone.
    - The LoRAs that answer, for members and for newcomers, exist.

    Args:
        method: A class, an instance with its settings, or a registered name.
        settings: Other settings of the run, dotted key → value, such as ``{"lora.ranks": (1, 4, 2)}``.
        model: Makes the base model, if it is not to be a tiny Llama.
        tolerance: How far apart executors may end, which sum in different orders.

    Raises:
        AssertionError: A property does not hold; which one, and at which client and tensor.
        UserError: The method refuses these settings.
    """
    case = _Case(method, settings or {}, AdaptedModel(model()), tolerance)
    expected = case.run("one client at a time")
    for executor in list(EXECUTORS)[1:]:
        both = f"{executor} and one at a time"
        _same_runs(case, f"executors agree ({both})", case.run(executor), expected, case.tolerance)
    whole = case.run("all clients at once")
    torch.manual_seed(1234)
    _same_runs(case, "the same seed gives the same run", case.run("all clients at once"), whole)
    _check_resumed(case, whole)
    _check_failure(case)
    _check_isolation(case, expected)
    _check_answers(case, whole[1])


@dataclass
class _Case:
    """A method on a model."""

    method: type[Method] | Method | str
    settings: Mapping[str, Any]
    model: AdaptedModel
    tolerance: float
    config: RunConfig = field(init=False)
    name: str = field(init=False)

    def __post_init__(self) -> None:
        changes = {"federation.rounds": len(PRESENT), **self.settings}
        self.config = with_settings(RunConfig(lora=LORA), changes)
        if isinstance(self.method, str):
            self.name, self.config = self.method, configured(self.config, self.method)
        else:
            self.name = (self.method if isinstance(self.method, type) else type(self.method)).__name__

    def bound(self, clients: int = len(ROWS)) -> Method:
        """A new instance, which knows nothing of the others."""
        if isinstance(self.method, str):
            found = get_method(self.method)
            made = found(self.config.section(section_of(found), found.Settings))
        else:
            made = self.method() if isinstance(self.method, type) else deepcopy(self.method)
        return made.bind(clients, self.config, self.model.layer_sizes)

    def federation(self, executor: str = "all clients at once", **options: Any) -> TinyFederation:
        rows = options.pop("rows", ROWS)
        config = training(max_grad_norm=0.5)
        return TinyFederation(self.model, self.bound(), rows, config, dropout=0.2, **options, **EXECUTORS[executor])

    def run(self, executor: str) -> tuple[History, TinyFederation]:
        """All rounds; what can be seen in any of them is checked on the way."""
        federation, history = self.federation(executor), list[list[ClientResult]]()
        base = {name: value.clone() for name, value in self.model.base.state_dict().items() if "base_layer" in name}
        for round_, clients in enumerate(PRESENT, 1):
            history.append(self.round(federation, round_, clients))
        now = self.model.base.state_dict()
        for name, value in base.items():
            self.hold(torch.equal(now[name], value), "the base model is frozen", f"{name} has changed")
        return history, federation

    def round(self, federation: TinyFederation, round_: int, clients: Sequence[int]) -> list[ClientResult]:
        told = dict(federation.server.messages(clients))
        before = {client: _cloned(federation.states[client].tensors) for client in clients}
        heard = {client: _cloned(message.tensors) for client, message in told.items()}
        results = federation.train(round_, clients, told)
        for client in clients:
            what, where = "a round is pure", f"client {client}, round {round_}"
            self.same(what, where + ", the state that went in", federation.states[client].tensors, before[client])
            if client in told:
                self.same(what, where + ", the server's message", told[client].tensors, heard[client])
        for client, result in zip(clients, results, strict=True):
            where = f"client {client}, round {round_}"
            self.hold(
                result.state.client == client, "a state keeps its client", f"{where}, is client {result.state.client}"
            )
            self.hold(result.failure is None, "training stays finite", f"{where}: {result.failure}")
            self.uploads(federation, result, where)
        federation.deliver(round_, results)
        return results

    def uploads(self, federation: TinyFederation, result: ClientResult, where: str) -> None:
        """Nothing, or all that is shared, as declared."""
        what, declared, method = "an upload has what shares() says", federation.server.shapes, federation.method
        for key, value in result.upload.items():
            self.hold(method.shares(key), what, f"{where}: {key} is sent, and shares() keeps it at its client")
            self.hold(key in declared, what, f"{where}: {key} is sent, which no client has by the method's slots")
            self.hold(value.dtype == torch.float32, what, f"{where}: {key} is {value.dtype}, not torch.float32")
            shape, most = tuple(value.shape), declared[key]
            fits = len(shape) == len(most) and all(n <= m for n, m in zip(shape, most, strict=True))
            fits = fits and (method.client_ranks is not None or shape == most)
            size = "uploads are as large as declared"
            self.hold(fits, size, f"{where}: {key} is {shape}, and the method's ranks make it {most}")
        missing = sorted(str(key) for key in declared.keys() - result.upload.keys()) if result.upload else []
        self.hold(not missing, what, f"{where}: {(missing or [''])[0]} is shared and was not sent")
        sent = result.state.sent or {}
        self.same("a client notes what the server has of it", f"{where}, state.sent", sent, result.upload)

    def hold(self, holds: bool, what: str, otherwise: str) -> None:
        if not holds:
            raise AssertionError(f"{self.name} breaks the rule that {what}: {otherwise}")

    def same(self, what: str, where: str, one: Tensors, other: Tensors, limit: float = 0.0) -> None:
        """Equal keys; values equal, or no further apart than the limit."""
        odd = sorted(str(key) for key in one.keys() ^ other.keys())
        self.hold(not odd, what, f"{where}: {(odd or [''])[0]} is there only once")
        for key, value in one.items():
            if torch.equal(value, other[key]):
                continue
            gap = float((value - other[key]).abs().max()) if value.shape == other[key].shape else torch.inf
            self.hold(gap < limit, what, f"{where}: {key} differs by {gap:.2g} (allowed: {limit:g})")


def _cloned(tensors: Tensors) -> dict[Any, Tensor]:
    return {key: value.clone() for key, value in tensors.items()}


def _same_runs(
    case: _Case, what: str, one: tuple[History, TinyFederation], other: tuple[History, TinyFederation], limit: float = 0
) -> None:
    """States, uploads and what the server says next."""
    first = len(other[0]) - len(one[0])
    for round_, (results, others) in enumerate(zip(one[0], other[0][first:], strict=True), first + 1):
        for result, expected in zip(results, others, strict=True):
            where = f"client {result.state.client}, round {round_}"
            case.same(what, where, result.state.tensors, expected.state.tensors, limit)
            case.same(what, f"{where}, upload", result.upload, expected.upload, limit)
    told, expected_told = (dict(run[1].server.messages(tuple(ROWS))) for run in (one, other))
    case.hold(told.keys() == expected_told.keys(), what, f"messages to {sorted(told.keys() ^ expected_told.keys())}")
    for client, message in told.items():
        where = f"client {client}, message after round {len(PRESENT)}"
        case.same(what, where, message.tensors, expected_told[client].tensors, limit)


def _check_resumed(case: _Case, whole: tuple[History, TinyFederation]) -> None:
    stopped = case.federation()
    for round_, clients in enumerate(PRESENT[:STOP], 1):
        stopped.round(round_, clients)
    server = stopped.server
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"round_{STOP:04d}"
        saved = Checkpoint(path, STOP, uploads=server.uploads, seen=server.seen, memory=server.memory)
        for state in stopped.states.values():
            saved.put_state(state)
        for client in server.uploads:
            saved.put_upload(client, stopped.uploads[client])
        saved.write_manifest(case.name)
        found = load_checkpoint(Path(folder), case.name)
        if found is None:
            raise AssertionError(f"{case.name}: the checkpoint was not written")
        resumed = case.federation(states=[found.state(client) for client in ROWS])
        found.restore(resumed.server)
        resumed.uploads = {client: found.upload(client) for client in server.uploads}
        history = [case.round(resumed, round_, PRESENT[round_ - 1]) for round_ in range(STOP + 1, len(PRESENT) + 1)]
        _same_runs(case, "a resumed run ends bitwise the same", (history, resumed), whole)


def _check_failure(case: _Case) -> None:
    what, clients = "a client that fails harms nobody", tuple(ROWS)
    healthy, sick = case.federation(), case.federation()
    poison = {key: torch.full_like(value, torch.nan) for key, value in sick.states[1].tensors.items()}
    sick.states[1] = sick.states[1].with_tensors(poison)
    one, other = (federation.train(1, clients, {}) for federation in (sick, healthy))
    case.hold(bool(one[1].failure), what, "client 1 has no finite number, and was not set aside")
    case.hold(one[1].state is sick.states[1], what, "client 1 failed, and did not keep the state that it came with")
    case.hold(not one[1].upload, what, "client 1 failed, and sent something")
    for client in (0, 2):
        where, limit = f"client {client}, beside one that failed", case.tolerance
        case.hold(one[client].failure is None, what, f"{where}: {one[client].failure}")
        case.same(what, where, one[client].state.tensors, other[client].state.tensors, limit)
    sick.deliver(1, one)
    for result in sick.round(2, (0, 2)):
        case.hold(result.failure is None, what, f"client {result.state.client}, one round later: {result.failure}")


def _check_isolation(case: _Case, expected: tuple[History, TinyFederation]) -> None:
    """Client 0, whose turn is first, has other rows in a round that nobody has heard anything of."""
    changed = case.federation("one client at a time", rows=ROWS | {0: examples(7, seed=99)})
    result = changed.round(1, PRESENT[0])[1]
    what = "what a client does reaches others through the server alone"
    case.same(what, "client 1, when client 0 has other rows", result.state.tensors, expected[0][0][1].state.tensors)


@torch.no_grad()
def _check_answers(case: _Case, federation: TinyFederation) -> None:
    """Members with the next message, and somebody new, for whom the federation has one more client."""
    method, new, joined = federation.method, len(ROWS), case.bound(len(ROWS) + 1)
    starts = {new: start_states(joined, joined.shape, [new])[0]}
    members = _received(federation.server, method, federation.states)
    newcomers = _received(replace(federation.server, method=joined), joined, starts)
    answering = Placement(*method.inference, method.scale, 0.0)
    members = method.personalise(case.model, members, ROWS, answering)
    _check_placed(case, "answer", members, answering)
    _check_placed(case, "answer for a newcomer", newcomers, Placement(*joined.newcomer, joined.scale, 0.0))


def _received(server: Server, method: Method, states: Mapping[int, ClientState]) -> list[ClientState]:
    told = server.messages(tuple(states))
    return [method.receive(state, told[c]) if c in told else state for c, state in states.items()]


def _check_placed(case: _Case, what: str, states: Sequence[ClientState], placement: Placement) -> None:
    for state in states:
        missing = sorted(set(placement.slots) - {key.slot for key in state.tensors})
        otherwise = f"client {state.client} has no {', '.join(missing)}"
        case.hold(not missing, f"the LoRAs that {what} are there", otherwise)
    case.model.load(states, placement)
    prompt = ROWS[0][0].prompt
    rows = BatchLayout(tuple(1 for _ in states), tuple(len(prompt) for _ in states))
    out = case.model.hidden(torch.tensor(prompt * len(states)), rows).last_hidden_state
    case.hold(bool(out.isfinite().all()), f"the LoRAs that {what} give numbers", "hidden states are not finite")
