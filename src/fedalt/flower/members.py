"""Who takes part in a run across sites: what sites say when they join, and whether they agree.

The server has neither rows nor base model. What it must know it is told: the fingerprints of base and method and the
shapes of uploads, which have to be the same for all, and each site's number of rows and name of its task.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping

from fedalt.config import RunConfig
from fedalt.errors import UserError
from fedalt.flower.requests import Common, Member, Reply
from fedalt.methods.base import Method
from fedalt.names import Key
from fedalt.runs.rounds import frozen_settings
from fedalt.runs.setup import RunInfo


def member_of(reply: Reply) -> Member:
    """What a site said when it joined."""
    if not isinstance(reply.body, Member):
        raise UserError(reply.why)
    return reply.body


def rule_of(config: RunConfig, method: Method) -> str:
    """Fingerprint of a method and its resolved settings, without rows, their scoring, and what is a site's own."""
    settings = frozen_settings(config, method)
    settings = {name: value for name, value in settings.items() if name not in ("data", "evaluation")}
    settings["model"] = {name: value for name, value in settings["model"].items() if name not in ("name", "device")}
    return hashlib.sha256(json.dumps([method.name, settings], sort_keys=True).encode()).hexdigest()


def common_to(members: Mapping[int, Member]) -> Common:
    """What most sites have in common."""
    counts = Counter(member.common for member in members.values()).most_common()
    if len(counts) > 1 and counts[0][1] == counts[1][1]:
        one, other = (next(c for c, member in members.items() if member.common == common) for common, _ in counts[:2])
        raise UserError(
            f"clients {one} and {other} do not fit together, and there is no majority: client {one}: "
            f"{members[one].common.differs(members[other].common).replace('this run', f'client {other}')}"
        )
    return counts[0][0]


def info_of(config: RunConfig, method: Method, members: Mapping[int, Member], common: Common) -> RunInfo:
    """What the rounds know of a run; of a site that has not come yet there are no rows and no task."""
    ids = range(method.clients)
    samples = {client: members[client].samples if client in members else 0 for client in ids}
    tasks = {str(client): members[client].task if client in members else "" for client in ids}
    notes = [
        f"client {client}: {member.skipped} rows skipped, their prompt fills data.cutoff"
        for client, member in members.items()
        if member.skipped
    ]
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
