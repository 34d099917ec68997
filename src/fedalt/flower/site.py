"""One site: trains, scores and keeps one client, with the ``client_round`` of every other executor.

STATE/<run>/                  a run's folder, with one client in it
    checkpoints/round_NNNN/   its state after each of the last two rounds, and what it replied, whole or not there
    results/, clients/<id>/   its answers, scores and personal model: readable by fedalt generate, evaluate, export
    events.jsonl              what it did, as in any run's folder, and every ``reply`` that left it
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedalt.config import FederationConfig, PrivacyConfig, RunConfig, parse_received, used_code, with_settings
from fedalt.data.encode import Example
from fedalt.data.federation import Federation, Row
from fedalt.data.load import elsewhere, load_as_it_is, load_federation
from fedalt.errors import UserError
from fedalt.evaluation.choices import options_of
from fedalt.evaluation.metrics import metric_of, metrics_in, over_clients
from fedalt.federation.client import SPENT, client_round, installed
from fedalt.federation.diagnostics import row_lora_drift
from fedalt.federation.fixed import codes
from fedalt.files import disk_errors, read_json, write_bytes, write_json
from fedalt.flower.certs import PrivateKey, PublicKey, check_site_key, keys_in
from fedalt.flower.consent import FEW, Consent
from fedalt.flower.masks import Sums
from fedalt.flower.members import rule_of
from fedalt.flower.own import COLUMNS, SiteRows
from fedalt.flower.own_report import ALONE, BLOCK
from fedalt.flower.requests import Common, Member, Opened, Part, Reply, Request, Scored, Scores, SiteError, Trained
from fedalt.flower.wire import Shape, pack, unpack
from fedalt.hub import is_hub_name
from fedalt.methods.base import Message
from fedalt.model.source import TINY_BASE
from fedalt.model.state import ClientState
from fedalt.names import HEAD, INDIVIDUAL, LOCAL, MIXER, PERSONAL, PRIVATE, REST_OF_WORLD, A, B, G, Key, W, parted
from fedalt.registry import SOURCES, TEMPLATES
from fedalt.runs.checkpoint import Checkpoint, load_checkpoint, next_checkpoint, prune, rounds_for
from fedalt.runs.client_folder import save_client
from fedalt.runs.clients import plans_of, states_in
from fedalt.runs.events import EventLog, Sink, read_events
from fedalt.runs.folder import RunFolder, claim_folder, open_run
from fedalt.runs.rounds import frozen_settings, log_start, run
from fedalt.runs.scoring import log_points, score_clients
from fedalt.runs.setup import Bases, Experiment, RunInfo, prepare
from fedalt.runtime import peak_memory, versions


def _load(rows: SiteRows, config: RunConfig, client: int) -> tuple[RunConfig, Federation]:
    """The run's settings as they hold here, and this client's rows alone.

    A source of the site's own with one client is that client, whatever its number; one with more must have this
    client among them. Tables and other sources without clients are all this client's.
    """
    own = {"model.name": rows.model, "model.device": rows.device}
    config = with_settings(config, {key: value for key, value in own.items() if value is not None})
    if rows.data is None:
        federation = load_federation(config.data, config.seed)
    else:
        read = {name: getattr(rows, name) for name in COLUMNS}
        read["label_names"] = rows.label_names or config.data.label_names
        data = elsewhere(config.data, rows.data).model_copy(update=read)
        config = config.model_copy(update={"data": data})
        federation = load_as_it_is(config.data, config.seed)
    mine = federation.clients.get(client)
    if rows.data is not None and len(federation.clients) == 1:
        [mine] = federation.clients.values()
    if mine is None:
        line = f"{config.data.source}: client {client} is not among clients {list(federation.ids)}"
        raise SiteError("client", line, len(federation.clients))
    return config, Federation({client: mine}, federation.source, federation.notes)


def _check_paths(rows: SiteRows, config: RunConfig) -> None:
    """Refuse settings of a server that would choose files here."""
    data, model = config.data, config.model.name
    named = {
        "data.source": rows.data is None and (data.source not in SOURCES or Path(data.source).exists()),
        "model.name": rows.model is None and model != TINY_BASE and _may_be_path(model),
        "data.template": data.template not in TEMPLATES,
        "data.partition.file": data.partition.file is not None,
    }
    if wrong := [name for name, is_path in named.items() if is_path]:
        raise SiteError(
            "path",
            f"the server's settings: refused: {wrong[0]} names a file or folder of this machine, which only "
            "its own --data and --model may",
        )


def _may_be_path(model: str) -> bool:
    return not is_hub_name(model) or Path(model).exists()


@contextmanager
def _coded(code: str) -> Iterator[None]:
    """What goes wrong inside is told to the server as this and no more."""
    try:
        yield
    except SiteError:
        raise
    except UserError as error:
        raise SiteError(code, str(error)) from None


_OWN = (INDIVIDUAL, LOCAL, PRIVATE, PERSONAL)
"""Slots that only their client trains, and no server fills."""
_REPLY = "reply.json"


@dataclass
class Site:
    """One client at its site.

    Attributes:
        state: Folder of its runs.
        bases: The base model in memory, shared with other sites of this process if there are any.
        rows: Where its rows come from, and other settings that are the site's own.
        consent: What may leave it.
        results: Gives the folder of a run's results, if not the site's own.
        alone: Whether server and sites are one user's on one machine, who may name any file.
        key: Its private key, beside which are the public ones of the other sites that it knows.
        note: Called with a line about everything it does.
    """

    client: int
    state: Path
    bases: Bases
    rows: SiteRows = field(default_factory=SiteRows)
    consent: Consent = field(default_factory=Consent)
    results: Callable[[RunFolder, RunConfig], RunFolder] = lambda own, config: own
    alone: bool = False
    key: Path | None = None
    note: Callable[[str], None] = lambda line: None
    _work: _Work | None = field(default=None, init=False)

    def answer(self, request: Request) -> Reply:
        """Do what is asked; what is wrong with the request or the site becomes the reply's error.

        A round that has finished is not trained again: its reply is given once more.
        """
        try:
            with _coded(_OTHERWISE.get(request.do, "failed")):
                work = self._working(request)
                work.check(request)
                done: Reply = getattr(work, request.do)(request)
                work.record(request, done)
                return done
        except SiteError as error:
            self.note(f"{request.do}: {error}")
            failed = Reply.failed(request, self.client, error)
            with suppress(UserError):  # where nothing can be written
                if self._work:
                    self._work.record(request, failed)
            return failed

    def train_alone(self, run_: str, sink: Sink = lambda event: None) -> None:
        """Train and score the client by itself, with a run's settings and for as many rounds, in that run's folder."""
        own, config = open_run(self.state / run_)
        rounds = len({event["round"] for event in read_events(own.events) if event["event"] == "client"})
        if not rounds:
            raise UserError(f"{own.path}: no round was trained here")
        config, mine = _load(self.rows, config, self.client)
        changes = {"method": "local", "out": str(own.path / ALONE), "privacy": PrivacyConfig()}
        config = config.model_copy(update=changes | {"federation": FederationConfig(rounds=rounds)})
        config = config.having("evaluation", every=rounds, early_stop=None)
        run(prepare(config, self.bases.of(config), mine, 1), claim_folder(config.folder, "overwrite"), sink)

    def _working(self, request: Request) -> _Work:
        if self._work is None or self._work.key != (request.run, request.settings, request.clients):
            self._work = None
            self._work = self._begin(request)
        return self._work

    def _begin(self, request: Request) -> _Work:
        rows = self.rows
        with _coded("settings"):
            config = parse_received(_settings(request), "the server's settings")
            if not self.alone:
                _check_paths(rows, config)
            if rows.secure and not config.federation.secure:
                raise SiteError("single")
            given = config.privacy
            if rows.epsilon is not None and (rows.epsilon < (given.epsilon or math.inf) or given.report == "all"):
                raise SiteError("epsilon")
            self.consent.check_settings(config, request.clients)
        if unused := [f"data.{n}" for n in COLUMNS[:-1] if rows.data and getattr(config.data, n) is not None]:
            self.note(f"{', '.join(unused)} of the server's settings do not count here; --set {unused[0][5:]}=… does")
        with _coded("rows"):
            config, federation = _load(rows, config, self.client)
            least, data = 1 if self.alone else rows.min_rows, federation.clients[self.client]
            if len(data.train) < least:
                raise SiteError("few_rows", f"{len(data.train)} training rows; min_rows is {least}", len(data.train))
            if rows.epsilon is not None and (given.delta or 0) > 1 / len(data.train):
                raise SiteError("epsilon")
            if odd := _odd_labels(config, [*data.train, *data.validation, *data.test]):
                raise SiteError(
                    "labels", f"{len(odd)} rows have labels such as {odd[0]!r}, not in model.labels", len(odd)
                )
        with _coded("model"):
            resident = self.bases.of(config)
        with _coded("rows"):
            experiment = prepare(config, resident, federation, request.clients)
        self.consent.check_uploads(experiment.upload_shapes)
        for line in experiment.notes:
            self.note(line)
        own = RunFolder(self.state / request.run)
        with _coded("disk"), disk_errors(own.path):
            own.path.mkdir(parents=True, exist_ok=True)
            mine = experiment.config.model_copy(update={"out": str(own.path)})  # the server's path is none of here
            own.write_config(mine, [f"{name}: {value}" for name, value in versions().items()])
        folder = self.results(own, experiment.config)
        key = (request.run, request.settings, request.clients)
        told = None if self.alone else rows
        least = config.federation.secure_min if self.consent.allow_two else max(config.federation.secure_min, FEW - 1)
        sums = Sums(self.client, own, least, *self._keys(config))
        return _Work(key, self.client, experiment, own, folder, EventLog(own.events), self.note, told, sums)

    def _keys(self, config: RunConfig) -> tuple[PrivateKey | None, Mapping[int, PublicKey] | None]:
        """With which its offers to a secure sum are signed, and by which it knows the others'."""
        if not config.federation.secure or self.alone:
            return None, None
        if self.key is None:
            raise SiteError("peers")
        with _coded("peers"):
            return check_site_key(self.key), keys_in(self.key.parent)


def _settings(request: Request) -> dict[str, Any]:
    try:
        values = json.loads(request.settings)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise SiteError("message", "the server's settings are no mapping in JSON")
    return values


def _odd_labels(config: RunConfig, rows: Sequence[Row]) -> list[str]:
    known = set(config.model.labels or ())
    return [row.output for row in rows if config.classifies and known and row.output not in known]


_OTHERWISE = {
    "train": "training",
    "offer": "sum",
    "mask": "sum",
    "open": "sum",
    "score": "scoring",
    "save": "disk",
}
"""Request → the code of what goes wrong over it and has no other."""


@dataclass
class _Work:
    """A site in one run; without ``rows`` the server may know all scores."""

    key: tuple[str, str, int]
    client: int
    experiment: Experiment
    own: RunFolder
    folder: RunFolder
    log: EventLog
    note: Callable[[str], None]
    rows: SiteRows | None
    sums: Sums

    @property
    def identity(self) -> str:
        """What this site's checkpoints are of: the run and its settings, the base, the rows."""
        run, settings, _ = self.key
        asked = frozen_settings(parse_received(json.loads(settings), "the server's settings"), self.experiment.method)
        parts = (run, json.dumps(asked, sort_keys=True), self.common.base, self.experiment.rows_digest)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    @cached_property
    def info(self) -> RunInfo:
        """What there is to know of the run, by this site."""
        return self.experiment.info

    @cached_property
    def common(self) -> Common:
        """What must be the same at all sites."""
        info, experiment = self.info, self.experiment
        shapes = tuple((str(key), tuple(shape)) for key, shape in info.shapes.items())
        rule = rule_of(experiment.config, experiment.method)
        sizes = (info.shared, info.trainable)
        layers = tuple(experiment.method.layers.items())
        code = tuple(used_code(experiment.config).items())
        return Common(info.base, shapes, *sizes, versions()["fedalt"], rule, layers, code)

    def check(self, request: Request) -> None:
        """Refuse to go on as another site than the one that joined."""
        if request.common and request.common != self.common.digest:
            raise SiteError("changed")

    def record(self, request: Request, reply: Reply) -> None:
        """Log an answer before it leaves, and which of the client's uploads the server said that it counts."""
        said = {"bytes_up": reply.size, "bytes_down": request.size, "counts": request.counts, "error": reply.error}
        self.log.emit("reply", round=request.round, client=self.client, do=request.do, **said)

    def join(self, request: Request) -> Reply:
        """Say what the server must know before the first round; nothing of it tells a row."""
        info, last = self.info, self._last()
        task = info.tasks[str(self.client)] if self.rows is None else self.rows.task or str(self.client)
        log_start(self.log, info, self.identity, last.round, resumed=self.log.path.is_file())
        skipped = sum(self.experiment.examples[self.client].skipped.values())
        member = Member(info.samples[self.client], task, self._holds(last), self.common, skipped)
        self.note(f"joined {request.run}: {info.config.method}, {request.clients} clients, round {last.round} done")
        return Reply.to(request, self.client, body=member)

    def train(self, request: Request) -> Reply:
        """Train a round and have it on disk before replying."""
        last = self._last()
        if last.round == request.round:
            self.note(f"round {request.round}: done before, replied again")
            return self._reply(last, request)
        if last.round > request.round:
            raise SiteError("round", f"round {request.round} is over, round {last.round} is done", last.round)
        if self.private and (sent := self._sent()) > last.round:
            raise SiteError("sent_before", count=sent)
        started, experiment = time.perf_counter(), self.experiment.in_folder(self.own)
        plans = plans_of(experiment, self.client, request.round)
        [result] = client_round(
            experiment.resident.model,
            [states_in(last, experiment)[self.client]],
            [self._told(request, last)],
            [plans],
            experiment.settings,
            round_=request.round,
        )
        if result.failure == SPENT:
            raise SiteError("budget")
        if result.failure:
            self.log.emit("client_failed", round=request.round, client=self.client, reason=result.failure)
            raise SiteError("not_finite", f"round {request.round}: {result.failure}")
        wire = experiment.config.flower.wire
        block, stats = pack(result.upload, wire), asdict(result.stats)
        untold = {"loss": None, "tokens": 0, "alpha": ()} if self.private and self._report != "all" else {}
        body = {**stats, **untold, "holds": request.round if block else self._holds(last), "cut": result.cut}
        with _coded("disk"), next_checkpoint(last, request.round) as new:
            new.put_state(replace(result.state, sent=parted(unpack(block, wire))[0] or None))
            write_bytes(new.path / BLOCK, block)
            write_json(new.path / _REPLY, body)
            new.write_manifest(self.identity)
        prune(self.own.checkpoints, self._scored(request.round))
        seconds = time.perf_counter() - started
        reply = self._reply(new, request)
        known = {name: value for name, value in stats.items() if value is not None}
        moved = {"seconds": seconds, "bytes_up": reply.size, "bytes_down": request.size, "row_lora_drift": None}
        self.log.emit("client", round=request.round, client=self.client, **known, **moved)
        also = {"loss": stats["loss"], "product_gap": None, "peak_memory": peak_memory()}
        self.log.emit("round", round=request.round, **moved, **also)
        self.note(f"round {request.round}: loss {result.stats.loss:.4f}, {seconds:.1f} s, {len(block):,} bytes up")
        return reply

    @property
    def private(self) -> bool:
        """Whether its steps are private."""
        return self.experiment.config.privacy.on

    @property
    def _report(self) -> str:
        return self.experiment.config.privacy.report

    def _sent(self) -> int:
        """The last round of which anything may have left, by the site's own log."""
        return max((event["round"] for event in read_events(self.log.path) if event["event"] == "client"), default=0)

    def offer(self, request: Request) -> Reply:
        """Begin an attempt at a secure sum."""
        self._upload(request)
        rule = self.experiment.method.weighs_by(self.experiment.config.federation)
        weight = self.info.samples[self.client] if rule == "samples" else 1
        return Reply.to(request, self.client, body=self.sums.offer(request, weight))

    def mask(self, request: Request) -> Reply:
        """Send what was trained in this round, masked."""
        upload = self._upload(request)
        block = self.sums.mask(request, codes(unpack(upload, self.experiment.config.flower.wire)))
        self.note(f"round {request.round}: masked for {len(request.offers)} clients, {len(block):,} bytes up")
        return Reply.to(request, self.client, block=block)

    def open(self, request: Request) -> Reply:
        """Take this site's own mask from the sum."""
        self._upload(request)
        with _coded("disk"):
            return Reply.to(request, self.client, body=Opened(self.sums.open(request)))

    def _upload(self, request: Request) -> bytes:
        """What was trained in the round that the server asks about."""
        last = self._last()
        if not self.experiment.config.federation.secure or last.round != request.round:
            raise SiteError("round", f"no secure sum of round {request.round} here", last.round)
        return (last.path / BLOCK).read_bytes()

    def score(self, request: Request) -> Reply:
        """Score the client as it left training and as it would start the next round; answers stay at the site."""
        if self.private and self._report == "none":
            raise SiteError("unreported")
        started = time.perf_counter()
        before, after = self._states(request)
        client, number, both = self.client, request.round, ({self.client: before}, {self.client: after})
        points = score_clients(self.experiment, self.folder, number, *both, changed=request.told)
        log_points(self.log, number, points, self.experiment.config.metric)
        seconds = time.perf_counter() - started
        self.log.emit("evaluated", round=number, seconds=seconds, peak_memory=peak_memory())
        drift = row_lora_drift(before.tensors, after.tensors) if REST_OF_WORLD in self.experiment.shape.slots else None
        scores = read_json(self.folder.scores(client, number))
        metric = metric_of(self.experiment.config.metric)
        self.note(f"round {number}: {metric.name} {scores[metric.name]:.{max(2, metric.digits)}f}")
        examples = self.experiment.examples[client]
        main = self._told_of(scores, examples.test)
        if main is None:
            raise SiteError(
                "few_rows", f"{len(examples.test)} test rows; no score of so few leaves", len(examples.test)
            )
        validation = scores["validation"] and self._told_of(scores["validation"], examples.validation)
        earlier = scores["before_aggregation"] and self._told_of(scores["before_aggregation"], examples.test)
        return Reply.to(request, client, body=Scored(main, earlier or None, validation or None, drift))

    def _told_of(self, scores: Mapping[str, Any], rows: Sequence[Example]) -> Scores | None:
        """What the server is told of scores: of no fewer rows than the site wants, and of categories that it names."""
        told: dict[str, Part] = {}
        for name, part in scores["categories"].items():
            mine = [example for example in rows if example.row.category == name]
            if (self.rows is None or name in self.rows.categories) and (kept := self._part(part, mine)):
                told[name] = kept
        found = self._part(scores, rows)
        if found is None or self.experiment.config.metric not in found.metrics:
            return None
        rest = len(rows) - sum(part.rows for part in told.values())
        few = 0 < rest < (self.rows.min_rows if self.rows else 1)  # whose score would follow from the others'
        return Scores(found.rows, found.metrics, {} if few else told, scores.get("rouge_tokenizer"))

    def _part(self, scores: Mapping[str, Any], rows: Sequence[Example]) -> Part | None:
        least = self.rows.min_rows if self.rows else 1
        choosing, known = sum(bool(options_of(example.row.instruction)) for example in rows), metrics_in(scores)
        counts = {
            name: choosing if metric_of(name).reads == "option" else len(rows) for name in scores if name in known
        }
        metrics = {name: float(scores[name]) for name, count in counts.items() if count >= least}
        return Part(len(rows), metrics) if metrics else None

    def save(self, request: Request) -> Reply:
        """Write the personal model."""
        _, state = self._states(request)
        [personal] = self.experiment.personalised([state])
        config = self.experiment.config
        save_client(self.folder, personal, self.experiment, request.round)
        scored = self.folder.scores(self.client, request.round)
        means: Mapping[str, float | None] = {"mean": None, "worst": None}
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
        self.own.key.unlink(missing_ok=True)
        self.log.emit("run_finished", round=request.round, metric=config.metric, **means)
        self.note(f"wrote {self.folder.client(self.client)}")
        return Reply.to(request, self.client)

    def _scored(self, number: int) -> Iterable[int]:
        """Rounds of which one may turn out to be the best; the server knows which."""
        evaluation = self.experiment.config.evaluation
        asked = range(0, number + 1, evaluation.every) if evaluation.early_stop else ()
        return rounds_for(self.own.checkpoints, asked)

    def _last(self) -> Checkpoint:
        with _coded("state"):
            found = load_checkpoint(self.own.checkpoints, self.identity)
        return found or self._none

    @property
    def _none(self) -> Checkpoint:
        return Checkpoint(self.own.checkpoints / "round_0000", 0)

    def _states(self, request: Request) -> tuple[ClientState, ClientState]:
        """The client's state as it left training, and as it would start the next round."""
        last = self._last()
        if last.round > request.round and request.do == "save":  # the best round was an earlier one
            last = load_checkpoint(self.own.checkpoints, self.identity, upto=request.round) or self._none
        elif last.round > request.round:
            raise SiteError("round", f"asked for round {request.round}, but round {last.round} is done", last.round)
        state = states_in(last, self.experiment)[self.client]
        return state, installed(self.experiment.method, state, self._told(request, last))

    def _told(self, request: Request, last: Checkpoint) -> Message | None:
        """What the server tells, if this site can do with it what it must."""
        if not request.told:
            return None
        holds = self._holds(last)
        if self.experiment.method.leave_one_out and request.share > 0 and holds != request.counts:
            raise SiteError(
                "apart", f"holds the upload of round {holds}, and that of round {request.counts} counts", holds
            )
        with _coded("message"):
            tensors = unpack(request.block, self.experiment.config.flower.wire, self._check_told)
            if not tensors:
                self._check_told({})
        return Message(tensors, request.share)

    def _check_told(self, shapes: Mapping[Key, Shape]) -> None:
        """Refuse what the server cannot have to tell.

        A mean has the names and shapes of uploads. What a method makes of single uploads is of this run's layers, and
        of no higher rank than all clients' ranks together.
        """
        experiment, method = self.experiment, self.experiment.method
        if not (method.needs_uploads or method.has_server_state):
            fit = shapes == experiment.upload_shapes
        else:
            fit = all(self._may_be_told(key, shape) for key, shape in shapes.items())
        if not fit:
            raise UserError("the server tells tensors of other names or shapes than this run's")

    def _may_be_told(self, key: Key, shape: Shape) -> bool:
        experiment, method = self.experiment, self.experiment.method
        if key.slot in (HEAD, MIXER):
            return experiment.upload_shapes.get(key) == shape
        if key.slot in _OWN or key.module not in method.layers or len(shape) != 2:
            return False
        d_in, d_out = method.layers[key.module]
        highest = method.clients * max(method.ranks.values(), default=1)
        forms = {A: (shape[0], d_in), B: (d_out, shape[1]), G: (shape[0], d_in), W: (d_out, d_in)}
        rank = {A: shape[0], B: shape[1], G: shape[0]}.get(key.factor, 1)
        return forms.get(key.factor) == shape and rank <= highest

    def _holds(self, last: Checkpoint) -> int:
        """The round of what it uploaded last, which is what it takes out of a mean."""
        return int(read_json(last.path / _REPLY)["holds"]) if last.round else 0

    def _reply(self, last: Checkpoint, request: Request) -> Reply:
        body = read_json(last.path / _REPLY)
        trained = Trained(**{**body, "alpha": tuple(body["alpha"])})
        block = b"" if self.experiment.config.federation.secure else (last.path / BLOCK).read_bytes()
        return Reply.to(request, self.client, body=trained, block=block)
