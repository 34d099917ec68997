"""The crew of a run across sites: what a round asks of them, and what of their answers counts."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch

from fedalt.config import RunConfig
from fedalt.errors import UserError, listed
from fedalt.federation.fixed import mean_by_codes
from fedalt.federation.server import Server
from fedalt.files import write_json
from fedalt.flower.masks import Total
from fedalt.flower.members import member_of
from fedalt.flower.nodes import Nodes
from fedalt.flower.requests import Common, Do, Member, Offer, Opened, Part, Reply, Request, Scored, Scores, Trained
from fedalt.flower.wire import Shape, pack, unpack
from fedalt.methods.base import Message, Method
from fedalt.model.state import ClientState
from fedalt.names import Key, Tensors
from fedalt.registry import METRICS
from fedalt.runs.checkpoint import Checkpoint
from fedalt.runs.clients import ClientReport
from fedalt.runs.events import EventLog
from fedalt.runs.folder import RunFolder
from fedalt.runs.rounds import check_budget
from fedalt.runs.scoring import Points, log_points
from fedalt.runs.setup import RunInfo
from fedalt.training.loop import TrainingStats

_WELCOME = 60.0
"""Seconds that sites which have just come have for joining."""
_NO_STATS = TrainingStats(0.0, 0, 0)


@dataclass
class RemoteClients:
    """Clients at their sites. Only uploads, losses, scores and counts come back from them.

    Attributes:
        run: Its name at the sites.
        server: Checks uploads, and is told who cannot take itself out of a mean.
        common: What all sites must have in common.
        members: Client → what it said when it joined.
        refused: Client → why it takes no part, and how often its site had come by then.
    """

    info: RunInfo
    run: str
    nodes: Nodes
    folder: RunFolder
    log: EventLog
    server: Server
    common: Common
    members: dict[int, Member] = field(default_factory=dict)
    refused: dict[int, tuple[str, int]] = field(default_factory=dict)
    _withheld: int = field(default=0, init=False)

    def train(
        self, chosen: Sequence[int], messages: Mapping[int, Message], last: Checkpoint, new: Checkpoint
    ) -> list[ClientReport]:
        """Ask for a round; late, failed and refused sites are left out of its mean and keep what they have."""
        least = min(self.info.config.flower.min_sites, len(chosen))
        self._welcome([client for client in chosen if client not in self.members])
        requests = self._requests("train", chosen, messages, new.round)
        found: dict[int, ClientReport] = {}
        norms: dict[int, float] = {}
        for client, reply in self._ask(requests, messages, least):
            found[client], norms[client] = self._take(client, reply, new, requests[client].size)
        if self.info.config.federation.secure:
            self._sum(found, new, least)
        for client, factor in self._oversized({c: norms[c] for c in norms if found[c].delivered}).items():
            found[client] = _failed(found[client], f"upload is {factor:.0f} times as long as the median of this round")
        for client in chosen:
            found.setdefault(client, self._absent(client, requests))
            took_part = found[client].delivered if self.info.config.federation.secure else not found[client].failure
            (self.server.apart.discard if took_part else self.server.apart.add)(client)
        outcomes = [found[client] for client in chosen]
        self._check_enough(outcomes, least, new.round)
        return outcomes

    def _sum(self, found: dict[int, ClientReport], new: Checkpoint, least: int) -> None:
        """Let sites add up, masked, what they have trained; clients keep what they have where that fails."""
        left = {client for client, report in found.items() if report.delivered}
        least = max(least, self.info.config.federation.secure_min)
        try:
            asked = joining(self.info.config, self.run, len(self.info.clients))
            asked = replace(asked, round=new.round, common=self.common.digest)
            for attempt in range(1, len(left) + 1):
                asked = replace(asked, attempt=attempt)
                total = self._masked(asked, left, found, least)
                if total is not None:
                    new.summed = self._opened(asked, total, found)
                    return
                left = {client for client in left if found[client].delivered}
        except UserError as error:
            self.log.emit("note", round=new.round, text=f"no sum of this round: {error}; clients keep what they have")
            found |= {client: replace(report, delivered=False) for client, report in found.items()}

    def _masked(
        self, asked: Request, clients: Collection[int], found: dict[int, ClientReport], least: int
    ) -> Total | None:
        """The masked sum of all who offer, or nothing where one of them went away over it."""
        offers = [reply.body for _, reply in self._each(replace(asked, do="offer"), clients, found)]
        told = tuple(sorted((one for one in offers if isinstance(one, Offer)), key=lambda offer: offer.client))
        if len(told) < least:
            raise UserError(f"{len(told)} clients were left, {least} are the fewest")
        total = Total(told, sum(math.prod(shape) for shape in self.info.shapes.values()))
        for client, reply in self._each(replace(asked, do="mask", offers=told), total.clients, found):
            try:
                total.add(reply.block)
            except UserError as error:
                found[client] = _failed(found[client], str(error))
        return total if all(found[client].delivered for client in total.clients) else None

    def _opened(self, asked: Request, total: Total, found: dict[int, ClientReport]) -> Tensors:
        """The mean, once all have taken their own masks from the sum."""
        opened = dict(self._each(replace(asked, do="open"), total.clients, found))
        seeds = {client: reply.body.seed for client, reply in opened.items() if isinstance(reply.body, Opened)}
        if gone := set(total.clients) - seeds.keys():
            raise UserError(f"{_clients(gone)} went away while it was opened")
        return mean_by_codes(total.opened(seeds), total.weight, self.info.shapes)

    def _each(
        self, asked: Request, clients: Collection[int], found: dict[int, ClientReport]
    ) -> Iterator[tuple[int, Reply]]:
        """What clients answer in a step of a secure sum; who does not is set aside."""
        until, waiting = time.monotonic() + self.info.config.flower.round_deadline, set(clients)
        for client, reply in self.nodes.ask(dict.fromkeys(sorted(clients), asked), lambda got: until):
            report = found[client]
            up, down = report.bytes_up + reply.size, report.bytes_down + asked.size
            found[client] = replace(report, bytes_up=up, bytes_down=down)
            waiting.discard(client)
            if reply.why:
                found[client] = _failed(found[client], reply.why)
            else:
                yield client, reply
        for client in waiting:
            found[client] = _failed(found[client], f"no answer to {asked.do} in the secure sum")

    def _welcome(self, clients: Sequence[int]) -> None:
        """Let sites join that were not there at the start, if they are now."""
        self.nodes.look()
        came = self.nodes.came
        again = [c for c in clients if c not in self.refused or self.refused[c][1] != came[c]]
        here = [client for client in again if client in self.nodes.node_of]
        if not here:
            return
        asked = joining(self.info.config, self.run, len(self.info.clients))
        until = time.monotonic() + _WELCOME
        for client, reply in self.nodes.ask(dict.fromkeys(here, asked), lambda got: until):
            self.admit(client, reply)

    def admit(self, client: int, reply: Reply) -> None:
        """Take a site in, or refuse it and say why in the log."""
        try:
            member = member_of(reply)
            if odd := member.common.differs(self.common):
                raise UserError(f"refused: {odd}")
        except UserError as error:
            self.refused[client] = str(error), self.nodes.came[client]
            self.log.emit("client_failed", round=self.server.round, client=client, reason=f"cannot join: {error}")
            return
        self.members[client] = member
        self.refused.pop(client, None)
        self.server.samples = {**self.server.samples, client: member.samples}
        upload = self.server.uploads.get(client)
        if upload and upload.round != member.holds:
            self.server.apart.add(client)

    def _absent(self, client: int, requests: Mapping[int, Request]) -> ClientReport:
        refused = self.refused.get(client)
        why = refused[0] if refused else f"no answer within {self.info.config.flower.round_deadline:g} s"
        return ClientReport(client, _NO_STATS, False, 0, requests[client].size if client in requests else 0, why)

    def _check_enough(self, outcomes: Sequence[ClientReport], least: int, round_: int) -> None:
        failed = [outcome for outcome in outcomes if outcome.failure]
        if len(outcomes) - len(failed) >= least:
            return
        if len(failed) == len(outcomes):
            check_budget([outcome.failure for outcome in failed], round_)
        for outcome in failed:
            self.log.emit("client_failed", round=round_, client=outcome.client, reason=outcome.failure)
        raise UserError(
            f"round {round_}: {len(outcomes) - len(failed)} sites delivered, flower.min_sites asks for {least} "
            f"({failed[0].failure}); finished rounds are safe, submit with --resume to go on"
        )

    def row_lora_drifts(self, new: Checkpoint, messages: Mapping[int, Message]) -> dict[int, float | None]:
        """Not known here: rows are at the sites, and so is this figure, in their logs."""
        return {}

    def score(self, new: Checkpoint, messages: Mapping[int, Message]) -> float | None:
        """Let every site score its client; answers stay there."""
        if self.info.config.privacy.report == "none":
            return None
        points: Points = {"after": {}, "before": {}, "validation": {}}
        for client, reply in self._answers("score", messages, new.round):
            try:
                scored = self._scores(reply)
            except UserError as error:
                reason = f"not scored: {error}"
                self.log.emit("client_failed", round=new.round, client=client, reason=reason)
                continue
            found = {"before": scored.before, "validation": scored.validation}
            parts = {point: part and self._as_in_file(client, part) for point, part in found.items()}
            after, others = self._as_in_file(client, scored.after), {"before_aggregation": parts["before"]}
            others["validation"] = parts["validation"]
            write_json(self.folder.scores(client, new.round), {"round": new.round, **after, **others})
            for point, part in {"after": after, **parts}.items():
                if part:
                    points[point][client] = part
        return log_points(self.log, new.round, points, self.info.config.metric)

    @property
    def keeps_best(self) -> bool:
        """Sites keep the states of scored rounds for early stopping only."""
        return self.info.config.evaluation.early_stop is not None

    def _scores(self, reply: Reply) -> Scored:
        if not isinstance(reply.body, Scored):
            raise UserError(reply.why)
        wholes = [whole for whole in (reply.body.after, reply.body.before, reply.body.validation) if whole]
        for part in (part for whole in wholes for part in (whole, *whole.categories.values())):
            if not part.metrics.keys() <= set(METRICS.names()):
                raise UserError("scores by metrics that are not known here")
        if any(self.info.config.metric not in whole.metrics for whole in wholes):
            raise UserError(f"no {self.info.config.metric} among its scores")
        return reply.body

    def _as_in_file(self, client: int, scores: Scores) -> dict[str, Any]:
        """Scores as a run on one machine writes them."""
        config = self.info.config
        how = {"stemmer": config.evaluation.stemmer, "rouge_tokenizer": scores.rouge_tokenizer}
        about = {} if config.classifies else how
        parts = {name: _flat(part) for name, part in scores.categories.items()}
        return {"client_id": client, **about, **_flat(scores), "categories": parts}

    def save(self, checkpoint: Checkpoint, messages: Mapping[int, Message]) -> None:
        """Let every site write its client's personal model."""
        for client, reply in self._answers("save", messages, checkpoint.round):
            if reply.why:
                reason = f"model not saved: {reply.why}"
                self.log.emit("client_failed", round=checkpoint.round, client=client, reason=reason)

    def _answers(self, do: Do, messages: Mapping[int, Message], round_: int) -> Iterator[tuple[int, Reply]]:
        """Every client's answer, in order, or the error that it is away."""
        clients = self.info.clients
        answered = dict(self._ask(self._requests(do, clients, messages, round_), messages, 1))
        away = {client: Reply(do, self.run, round_, client, unfit="its site is away") for client in clients}
        return iter((away | answered).items())

    def _take(self, client: int, reply: Reply, new: Checkpoint, down: int) -> tuple[ClientReport, float]:
        """One answer to a round: an upload that fits goes into the checkpoint."""
        try:
            said, upload = self._read(client, reply, new.round)
        except UserError as error:
            return ClientReport(client, _NO_STATS, False, reply.size, down, str(error)), 0.0
        new.put_upload(client, upload)
        loss = math.nan if said.loss is None else said.loss
        stats = TrainingStats(loss, said.steps, said.tokens, said.alpha, said.epsilon)
        secure = self.info.config.federation.secure
        delivered = said.holds == new.round if secure else bool(upload)
        return ClientReport(client, stats, delivered, reply.size, down, cut=said.cut), 0.0 if secure else _norm(upload)

    def _read(self, client: int, reply: Reply, round_: int) -> tuple[Trained, Tensors]:
        if not isinstance(reply.body, Trained):
            raise UserError(reply.why)
        method, privacy = self.info.method, self.info.config.privacy
        if (reply.body.loss is None) != (privacy.on and privacy.report != "all"):
            raise UserError(
                f"client {client}: {'no' if reply.body.loss is None else 'a'} loss, unlike others in this round"
            )
        if len(reply.body.alpha) not in (0, len(method.layers)):
            raise UserError(f"client {client}: {len(reply.body.alpha)} mixer weights, of {len(method.layers)} layers")
        due = False if self.info.config.federation.secure else uploads_in(method, round_)
        if due is not None and due != bool(reply.block):
            raise UserError(f"client {client}: {'no upload' if due else 'an upload'}, unlike others in this round")

        def fit(shapes: Mapping[Key, Shape]) -> None:
            self.server.check_shapes(client, shapes)

        upload = unpack(reply.block, self.info.config.flower.wire, fit)
        if upload:
            self.server.check(client, upload)
        return reply.body, upload

    def _oversized(self, norms: Mapping[int, float]) -> dict[int, float]:
        """Clients whose upload dwarfs the others', and how far; three uploads at least make a median."""
        if len(norms) < 3:
            return {}
        middle, limit = median(norms.values()), self.info.config.flower.norm_limit
        return {client: norm / middle for client, norm in norms.items() if middle > 0 and norm > limit * middle}

    def _requests(
        self, do: Do, clients: Sequence[int], messages: Mapping[int, Message], round_: int
    ) -> dict[int, Request]:
        """What members are asked, with what they are told."""
        requests, tensors, packed = {}, None, b""
        asked = joining(self.info.config, self.run, len(self.info.clients))
        withheld = self._withhold(clients)
        for client in clients:
            if client not in self.members:
                continue
            message = None if client in withheld else messages.get(client)
            upload = self.server.uploads.get(client)
            request = replace(asked, do=do, round=round_, common=self.common.digest)
            request = replace(request, counts=upload.round if upload else 0)
            if message is not None:
                if message.tensors is not tensors:  # the broadcast mean is one object for all
                    tensors, packed = message.tensors, pack(message.tensors, self.info.config.flower.wire)
                request = replace(request, share=message.share, told=True, block=packed)
            requests[client] = request
        return requests

    def _withhold(self, clients: Sequence[int]) -> set[int]:
        """Clients who may not be told what is made of one other upload alone, which they would see as it is."""
        counts, number = set(self.server.uploads), self.server.round
        found = {client for client in clients if len(counts - {client}) == 1}
        if not found or self.info.config.flower.allow_two:
            return set()
        if self._withheld != number:
            self._withheld = number
            self.log.emit(
                "note",
                round=number,
                text=f"nothing is told to {_clients(found)}: only one other upload counts, which would be seen as it "
                "is; more sites, or flower.allow_two and --allow-two at all sites",
            )
        return found

    def _ask(
        self, requests: dict[int, Request], messages: Mapping[int, Message], least: int
    ) -> Iterator[tuple[int, Reply]]:
        """Answers until the deadline, and beyond it while there are too few.

        A site that cannot take itself out of the mean is asked again, with a row of its own.
        """
        deadline, good = time.monotonic() + self.info.config.flower.round_deadline, 0
        apart = list[int]()
        for client, reply in self.nodes.ask(requests, lambda got: deadline if got >= least else float("inf")):
            if reply.error == "apart":
                apart.append(client)
                text = f"client {client}: holds the upload of round {reply.count}, and that of round "
                text += (
                    f"{requests[client].counts} counts; its state was lost or is an older copy; its row comes from here"
                )
                self.log.emit("note", round=requests[client].round, text=text)
            else:
                good += not reply.why
                yield client, reply
        if apart:
            self.server.apart.update(apart)
            first = requests[apart[0]]
            again = self._requests(first.do, apart, messages, first.round)
            yield from self.nodes.ask(again, lambda got: deadline if good + got >= least else float("inf"))


def joining(config: RunConfig, run: str, clients: int) -> Request:
    """The request to join a run."""
    return Request("join", run, json.dumps(config.portable()), clients)


def _clients(clients: set[int]) -> str:
    return f"client{'s' * (len(clients) > 1)} {listed(sorted(clients))}"


def _failed(outcome: ClientReport, why: str) -> ClientReport:
    return replace(outcome, delivered=False, failure=why)


def _norm(tensors: Tensors) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values()))


def _flat(part: Part) -> dict[str, Any]:
    return {"rows": part.rows, **part.metrics}


def uploads_in(method: Method, round_: int) -> bool | None:
    """Whether clients upload in a round; None where it cannot be told from outside."""
    shapes, [first, *_] = method.shape.shapes(), method.layers
    state = ClientState(0, round_, {key: torch.zeros(shape) for key, shape in shapes.items() if key.module == first})
    try:
        return bool(method.uploaded(state).sent)
    except Exception:  # a method of somebody's own may need more of a state
        return None
