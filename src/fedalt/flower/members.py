"""Who takes part in a run across sites: what sites say when they join, and whether they agree.

The server has neither rows nor base model. What it must know it is told: the fingerprints of base and method and the
shapes of uploads, which have to be the same for all, and each site's number of rows and name of its task.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedalt.config import RunConfig
from fedalt.errors import UserError
from fedalt.flower.requests import Reply
from fedalt.methods.base import Method
from fedalt.names import Key
from fedalt.runs.rounds import frozen_settings
from fedalt.runs.setup import RunInfo


@dataclass(frozen=True)
class Common:
    """What all sites of a run have in common.

    Attributes:
        base: Fingerprint of the frozen base's weights.
        shapes: Shape of every tensor that a client may upload.
        shared: Parameters that a client sends per round.
        trainable: Parameters that a client trains.
        fedalt: Version of this package.
        method: Fingerprint of the method and its settings; see ``rule_of``.
        layers: Path of every adapted layer and its (d_in, d_out).
        code: What of the settings is in a file of the site's own, and the file's digest.
    """

    base: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    shared: int
    trainable: int
    fedalt: str
    method: str
    layers: tuple[tuple[str, tuple[int, int]], ...] = ()
    code: tuple[tuple[str, str], ...] = ()

    @property
    def layer_sizes(self) -> dict[str, tuple[int, int]]:
        """Path of every adapted layer → (d_in, d_out)."""
        return dict(self.layers)

    @staticmethod
    def parse(value: Mapping[str, Any]) -> Common:
        """From JSON."""
        shapes = tuple((str(key), tuple(map(int, shape))) for key, shape in value["shapes"])
        numbers = (int(value["shared"]), int(value["trainable"]))
        layers = tuple((str(path), (int(size[0]), int(size[1]))) for path, size in value.get("layers", ()))
        code = tuple((str(name), str(digest)) for name, digest in value.get("code", ()))
        return Common(str(value["base"]), shapes, *numbers, str(value["fedalt"]), str(value["method"]), layers, code)

    @property
    def digest(self) -> str:
        """All of it in a word, which every later request carries."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]

    def differs(self, other: Common) -> str:
        """In what this is unlike another, in words; nothing where they are equal."""
        if self.base != other.base:
            return f"its base model is {self.base[:12]}, this run's is {other.base[:12]}"
        if self.fedalt != other.fedalt:
            return f"it has fedalt {self.fedalt}, this run {other.fedalt}"
        theirs = dict(other.code)
        for name, digest in self.code:
            if theirs.get(name) != digest:
                return f"its file with {name} is {digest[:12]}, this run's is {theirs.get(name, 'none')[:12]}"
        odd = next((mine for mine, others in zip(self.shapes, other.shapes, strict=False) if mine != others), None)
        if odd or len(self.shapes) != len(other.shapes):
            return f"its uploads would have other shapes than this run's ({odd or len(self.shapes)})"
        if self.method != other.method:
            return f"its method and settings are {self.method[:12]}, this run's are {other.method[:12]}"
        return "" if self == other else "its adapters are of another size"


@dataclass(frozen=True)
class Member:
    """A site that takes part.

    Attributes:
        samples: Training rows.
        task: Name of its task.
        holds: Round of its last upload, 0 for none.
        common: What must be the same everywhere.
        notes: What the user should know.
    """

    samples: int
    task: str
    holds: int
    common: Common
    notes: tuple[str, ...] = ()

    @staticmethod
    def parse(client: int, reply: Reply) -> Member:
        """From a reply to ``join``.

        Raises:
            UserError: The site refuses, or answers something else.
        """
        if reply.error:
            raise UserError(reply.error)
        try:
            body = reply.body
            if body["client"] != client:
                raise UserError(f"its state is client {body['client']}'s")
            common = Common.parse(body["common"])
            return Member(int(body["samples"]), str(body["task"]), int(body["holds"]), common, tuple(body["notes"]))
        except UserError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"no such answer is known ({error!r})") from None

    def to_json(self) -> dict[str, Any]:
        """For a reply."""
        return asdict(self)


def rule_of(config: RunConfig, method: Method) -> str:
    """Fingerprint of a method and its resolved settings, without rows, their scoring, and what is a site's own."""
    settings = frozen_settings(config, method)
    settings = {name: value for name, value in settings.items() if name not in ("data", "evaluation")}
    settings["model"] = {name: value for name, value in settings["model"].items() if name not in ("name", "device")}
    return hashlib.sha256(json.dumps([method.name, settings], sort_keys=True).encode()).hexdigest()


def common_to(members: Mapping[int, Member]) -> Common:
    """What most sites have in common.

    Raises:
        UserError: There is no majority.
    """
    counts = Counter(member.common for member in members.values()).most_common()
    if len(counts) > 1 and counts[0][1] == counts[1][1]:
        one, other = (next(c for c, member in members.items() if member.common == common) for common, _ in counts[:2])
        raise UserError(
            f"clients {one} and {other} do not fit together, and there is no majority: client {one}: "
            f"{members[one].common.differs(members[other].common).replace('this run', f'client {other}')}"
        )
    return counts[0][0]


def facts_of(config: RunConfig, method: Method, members: Mapping[int, Member], common: Common) -> RunInfo:
    """What the rounds know of a run; of a site that has not come yet there are no rows and no task."""
    ids = range(method.clients)
    samples = {client: members[client].samples if client in members else 0 for client in ids}
    tasks = {str(client): members[client].task if client in members else "" for client in ids}
    notes = [f"client {client}: {note}" for client, member in members.items() for note in member.notes]
    return RunInfo(
        config,
        method,
        common.base,
        "",
        samples,
        tuple(ids),
        tasks,
        {Key.parse(key): shape for key, shape in common.shapes},
        "sites",
        common.shared,
        common.trainable,
        {"source": "sites", "rows": {str(client): count for client, count in samples.items()}},
        tuple(notes),
    )
