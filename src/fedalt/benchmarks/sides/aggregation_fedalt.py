"""fedalt's own aggregation: the server's sum and mean, then every client's subtraction, one client at a time."""

from __future__ import annotations

from fedalt.benchmarks.sides.uploads import SERVED, norm, shape, uploads
from fedalt.benchmarks.task import Job, Outcome, Spec
from fedalt.config import FederationConfig
from fedalt.federation.server import Server
from fedalt.methods.registry import get_method
from fedalt.model.state import ClientState
from fedalt.names import ROW


def prepare(spec: Spec) -> Job:
    """Everything before the clock."""
    adapters = shape(spec)
    method = get_method("fedalt")(spec.clients)
    states = [ClientState(k, 1, mine, mine) for k, mine in enumerate(uploads(spec, adapters))]
    sizes = {key: size for key, size in adapters.shapes().items() if method.shares(key)}

    def aggregate(states: list[ClientState]) -> list[float]:
        server = Server(method, FederationConfig(), dict.fromkeys(range(spec.clients), 1), sizes)
        sent = {state.client: state.sent or {} for state in states}
        server.receive(sent, sent.__getitem__, 1)
        messages = server.messages(tuple(state.client for state in states))
        norms = []
        for state in states:
            installed = method.install(state, messages[state.client])
            if state.client < SERVED:
                norms.append(norm({key: value for key, value in installed.tensors.items() if key.slot == ROW}))
        return norms

    return Job(lambda: aggregate(states[:2]), lambda: Outcome(values=aggregate(states)))
