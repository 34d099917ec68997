"""One site: trains, scores and keeps one client, with the ``client_round`` of every other executor.

STATE/<run>/                  a run's folder, with one client in it
    checkpoints/round_NNNN/   its state after each of the last two rounds, and what it replied, whole or not there
    results/, clients/<id>/   its answers, scores and personal model: readable by fedalt generate, evaluate, export
    events.jsonl              what it did
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedalt.config import RunConfig, parse_received, used_code, with_settings
from fedalt.data.federation import Federation
from fedalt.data.load import elsewhere, load_as_it_is, load_federation
from fedalt.errors import UserError
from fedalt.evaluation.metrics import metric_of, metrics_in, over_clients
from fedalt.federation.client import client_round, installed
from fedalt.federation.diagnostics import row_lora_drift
from fedalt.files import read_json, write_bytes, write_json
from fedalt.flower.consent import Consent
from fedalt.flower.members import Common, Member, rule_of
from fedalt.flower.requests import ApartError, Reply, Request
from fedalt.flower.wire import pack, unpack
from fedalt.methods.exchange import Message
from fedalt.model.state import ClientState
from fedalt.names import REST_OF_WORLD, parted
from fedalt.runs.checkpoint import Checkpoint, load_checkpoint, next_checkpoint, prune, rounds_for
from fedalt.runs.client_folder import save_client
from fedalt.runs.clients import plans_of, states_in
from fedalt.runs.events import EventLog
from fedalt.runs.folder import RunFolder
from fedalt.runs.machine import versions
from fedalt.runs.rounds import frozen_settings
from fedalt.runs.scoring import Scoring
from fedalt.runs.setup import Bases, Experiment, RunInfo, prepare


@dataclass(frozen=True)
class SiteRows:
    """What a site says for itself; whatever it leaves out is as in the run's settings.

    Attributes:
        data: Its rows, in any form that ``data.source`` takes.
        model: Where its copy of the base model is.
        device: Where it trains.
    """

    data: str | None = None
    model: str | None = None
    device: str | None = None

    def load(self, settings: dict[str, Any], client: int) -> tuple[RunConfig, Federation]:
        """The run's settings as they hold here, and this client's rows alone.

        A source of the site's own with one client is that client, whatever its number; one with more must have this
        client among them. Tables and other sources without clients are all this client's.

        Raises:
            UserError: As for a run on one machine; or this client is not in the source.
        """
        config = parse_received(settings, "the server's settings")
        own = {"model.name": self.model, "model.device": self.device}
        config = with_settings(config, {key: value for key, value in own.items() if value is not None})
        if self.data is None:
            federation = load_federation(config.data, config.seed)
        else:
            config = config.model_copy(update={"data": elsewhere(config.data, self.data)})
            federation = load_as_it_is(config.data, config.seed)
        mine = federation.clients.get(client)
        if self.data is not None and len(federation.clients) == 1:
            [mine] = federation.clients.values()
        if mine is None:
            raise UserError(f"{config.data.source}: client {client} is not among clients {list(federation.ids)}")
        return config, Federation({client: mine}, federation.source, federation.notes)


_REPLY, _BLOCK = "reply.json", "reply.safetensors"


@dataclass
class Site:
    """One client at its site.

    Attributes:
        client: Its id.
        state: Folder of its runs.
        bases: The base model in memory, shared with other sites of this process if there are any.
        rows: Where its rows come from, and other settings that are the site's own.
        consent: What may leave it.
        results: Gives the folder of a run's results, if not the site's own.
        note: Called with a line about everything it does.
    """

    client: int
    state: Path
    bases: Bases
    rows: SiteRows = field(default_factory=SiteRows)
    consent: Consent = field(default_factory=Consent)
    results: Callable[[RunFolder, RunConfig], RunFolder] = lambda own, config: own
    note: Callable[[str], None] = lambda line: None
    _work: _Work | None = field(default=None, init=False)

    def answer(self, request: Request) -> Reply:
        """Do what is asked; what is wrong with the request or the site becomes the reply's error.

        A round that has finished is not trained again: its reply is given once more.
        """
        try:
            work = self._working(request)
            work.check(request)
            done: Reply = getattr(work, request.do)(request)
        except UserError as error:
            self.note(f"{request.do}: {error}")
            return Reply({"apart": True} if isinstance(error, ApartError) else {}, str(error))
        return replace(done, body={**done.body, "run": request.run, "round": request.round})

    def _working(self, request: Request) -> _Work:
        if self._work is None or self._work.key != (request.run, request.settings, request.clients):
            self._work = None
            self._work = self._begin(request)
        return self._work

    def _begin(self, request: Request) -> _Work:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", request.run):
            raise UserError(f"run: {request.run!r} is no name of a folder")
        config, federation = self.rows.load(json.loads(request.settings), self.client)
        self.consent.check_settings(config, request.clients)
        experiment = prepare(config, self.bases.of(config), federation, request.clients)
        self.consent.check_uploads(experiment.upload_shapes)
        own = RunFolder(self.state / request.run)
        own.path.mkdir(parents=True, exist_ok=True)
        own.write_config(experiment.config, [f"{name}: {value}" for name, value in versions().items()])
        folder = self.results(own, experiment.config)
        key = (request.run, request.settings, request.clients)
        return _Work(key, self.client, experiment, own, folder, EventLog(own.events), self.note)


@dataclass
class _Work:
    """A site in one run."""

    key: tuple[str, str, int]
    client: int
    experiment: Experiment
    own: RunFolder
    folder: RunFolder
    log: EventLog
    note: Callable[[str], None]

    @property
    def identity(self) -> str:
        """What this site's checkpoints are of: the run and its settings, the base, the rows."""
        run, settings, _ = self.key
        asked = frozen_settings(parse_received(json.loads(settings), "the server's settings"), self.experiment.method)
        parts = (run, json.dumps(asked, sort_keys=True), self.common.base, self.experiment.rows_digest)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    @cached_property
    def facts(self) -> RunInfo:
        """What there is to know of the run, by this site."""
        return self.experiment.facts

    @cached_property
    def common(self) -> Common:
        """What must be the same at all sites."""
        facts, experiment = self.facts, self.experiment
        shapes = tuple((str(key), tuple(shape)) for key, shape in facts.shapes.items())
        rule = rule_of(experiment.config, experiment.method)
        sizes = (facts.shared, facts.trainable)
        layers = tuple(experiment.method.layers.items())
        code = tuple(used_code(experiment.config).items())
        return Common(facts.base, shapes, *sizes, versions()["fedalt"], rule, layers, code)

    def check(self, request: Request) -> None:
        """Refuse to go on as another site than the one that joined."""
        if request.common and request.common != self.common.digest:
            raise UserError(
                f"client {self.client}: refused: this site's base model, shapes, method or version are no longer those "
                f"with which it joined (base {self.common.base[:12]}, fedalt {self.common.fedalt}); start it as it was"
            )

    def join(self, request: Request) -> Reply:
        """Say what the server must know before the first round; nothing of it tells a row."""
        facts, last = self.facts, self._last()
        task = facts.tasks[str(self.client)]
        member = Member(facts.samples[self.client], task, self._holds(last), self.common, facts.notes)
        self.note(f"joined {request.run}: {facts.config.method}, {request.clients} clients, round {last.round} done")
        return Reply({"client": self.client, **member.to_json()})

    def train(self, request: Request) -> Reply:
        """Train a round and have it on disk before replying."""
        last = self._last()
        if last.round == request.round:
            self.note(f"round {request.round}: done before, replied again")
            return self._reply(last)
        if last.round > request.round:
            raise UserError(f"client {self.client}: round {request.round} is over, round {last.round} is done")
        started, experiment = time.perf_counter(), self.experiment
        plans = plans_of(experiment, self.client, request.round)
        [result] = client_round(
            experiment.resident.model,
            [states_in(last, experiment)[self.client]],
            [self._told(request, last)],
            [plans],
            experiment.settings,
            request.round,
        )
        if result.failure:
            self.log.emit("client_failed", round=request.round, client=self.client, reason=result.failure)
            self.note(f"round {request.round}: {result.failure}")
            return Reply({"stats": {**asdict(result.stats), "loss": None}, "failure": result.failure})
        block = pack(result.upload, experiment.config.flower.wire)
        holds = request.round if block else self._holds(last)
        stats = asdict(result.stats)
        body = {"stats": stats, "failure": None, "holds": holds}
        with next_checkpoint(last, request.round) as new:
            new.put_state(replace(result.state, sent=parted(unpack(block))[0] or None))
            write_bytes(new.path / _BLOCK, block)
            write_json(new.path / _REPLY, body)
            new.write_manifest(self.identity)
        prune(self.own.checkpoints, self._scored(request.round))
        seconds = time.perf_counter() - started
        self.log.emit("client", round=request.round, client=self.client, seconds=seconds, **stats)
        self.note(f"round {request.round}: loss {result.stats.loss:.4f}, {seconds:.1f} s, {len(block):,} bytes up")
        return Reply(body, block=block)

    def score(self, request: Request) -> Reply:
        """Score the client as it left training and as it would start the next round; answers stay at the site."""
        before, after = self._states(request)
        scoring = Scoring(self.experiment, self.folder, self.log)
        client, number = self.client, request.round
        scoring.score(number, {client: before}, {client: after}, changed=request.told)
        drift = row_lora_drift(before.tensors, after.tensors) if REST_OF_WORLD in self.experiment.shape.slots else None
        scores = read_json(self.folder.scores(client, number))
        metric = metric_of(self.experiment.config.metric)
        self.note(f"round {number}: {metric.name} {scores[metric.name]:.{max(2, metric.digits)}f}")
        return Reply({"scores": scores, "row_lora_drift": drift})

    def save(self, request: Request) -> Reply:
        """Write the personal model."""
        _, state = self._states(request)
        [personal] = self.experiment.personalised([state])
        config = self.experiment.config
        save_client(self.folder, personal, self.experiment, request.round)
        scored = self.folder.scores(self.client, request.round)
        if self.folder == self.own and scored.is_file():  # a finished run with one client
            scores = metrics_in(read_json(scored))
            means = over_clients([scores[config.metric]], config.metric)
            block = {"round": request.round, **means, "clients": {self.client: scores}}
            final: dict[str, Any] = {"method": config.method, "metric": config.metric, "last": block}
            final["best_validation"] = None
            if config.evaluation.early_stop:  # after the last round the best one, if that is another
                old = read_json(self.own.final_scores) if self.own.final_scores.is_file() else final
                last = max(old["last"], block, key=lambda one: int(one["round"]))
                final |= {"last": last, "best_validation": block, "kept": "best_validation"}
            write_json(self.own.final_scores, final)
        self.note(f"wrote {self.folder.client(self.client)}")
        return Reply()

    def _scored(self, number: int) -> Iterable[int]:
        """Rounds of which one may turn out to be the best; the server knows which."""
        evaluation = self.experiment.config.evaluation
        asked = range(0, number + 1, evaluation.every) if evaluation.early_stop else ()
        return rounds_for(self.own.checkpoints, asked)

    def _last(self) -> Checkpoint:
        return load_checkpoint(self.own.checkpoints, self.identity) or self._none

    @property
    def _none(self) -> Checkpoint:
        return Checkpoint(self.own.checkpoints / "round_0000", 0)

    def _states(self, request: Request) -> tuple[ClientState, ClientState]:
        """The client's state as it left training, and as it would start the next round."""
        last = self._last()
        if last.round > request.round and request.do == "save":  # the best round was an earlier one
            last = load_checkpoint(self.own.checkpoints, self.identity, upto=request.round) or self._none
        elif last.round > request.round:
            raise UserError(f"client {self.client}: asked for round {request.round}, but round {last.round} is done")
        state = states_in(last, self.experiment)[self.client]
        return state, installed(self.experiment.method, state, self._told(request, last))

    def _told(self, request: Request, last: Checkpoint) -> Message | None:
        """What the server tells, if this site can do with it what it must."""
        if not request.told:
            return None
        holds = self._holds(last)
        if self.experiment.method.leave_one_out and request.share > 0 and holds != request.counts:
            raise ApartError(
                f"client {self.client}: holds the upload of round {holds}, and that of round {request.counts} counts; "
                "its state was lost or is an older copy"
            )
        return Message(unpack(request.block), request.share)

    def _holds(self, last: Checkpoint) -> int:
        """The round of what it uploaded last, which is what it takes out of a mean."""
        return int(read_json(last.path / _REPLY)["holds"]) if last.round else 0

    def _reply(self, last: Checkpoint) -> Reply:
        return Reply(read_json(last.path / _REPLY), block=(last.path / _BLOCK).read_bytes())
