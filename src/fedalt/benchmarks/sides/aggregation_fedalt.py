"""fedalt's own aggregation: the server's sum and mean, then every client's subtraction, one client at a time.

Uploads are in files, as those of a run are, and are read one at a time; reading them is timed, writing them is not.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file, save_file

from fedalt.benchmarks.sides.uploads import SERVED, norm, shape, upload
from fedalt.benchmarks.task import Job, Outcome, Spec
from fedalt.config import FederationConfig, RunConfig
from fedalt.federation.server import Server
from fedalt.methods.registry import build
from fedalt.model.state import ClientState
from fedalt.names import REST_OF_WORLD, Key, Tensors


def prepare(spec: Spec) -> Job:
    """Everything before the clock."""
    adapters = shape(spec)
    method = build(RunConfig(), spec.clients)
    sizes = {key: size for key, size in adapters.shapes().items() if method.shares(key)}
    folder = TemporaryDirectory(prefix="fedalt-bench-")

    def file(client: int) -> Path:
        return Path(folder.name) / f"{client}.safetensors"

    def read(client: int) -> Tensors:
        return {Key.parse(name): value for name, value in load_file(file(client)).items()}

    for client in range(spec.clients):
        save_file({str(key): value for key, value in upload(spec, adapters, client).items()}, file(client))

    def aggregate(clients: range) -> list[float]:
        server = Server(method, FederationConfig(), dict.fromkeys(clients, 1), sizes)
        server.receive(clients, read, 1)
        messages = server.messages(clients)
        norms = []
        for client in clients:
            sent = read(client)
            installed = method.receive(ClientState(client, 1, sent, sent), messages[client])
            if client < SERVED:
                norms.append(
                    norm({key: value for key, value in installed.tensors.items() if key.slot == REST_OF_WORLD})
                )
        return norms

    def play() -> Outcome:
        with folder:
            return Outcome(values=aggregate(range(spec.clients)))

    return Job(lambda: aggregate(range(2)), play)
