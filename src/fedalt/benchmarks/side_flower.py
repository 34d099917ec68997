"""The PEFT round inside Flower's simulation: FedAvg, as many clients at a time as there are threads, one thread each.

Flower runs two rounds in one simulation: in the first every actor imports, builds its base and takes a step; the
second is measured, from the server's first message to the new mean. Memory is that of the server's process and of all
actors together.
Needs ``pip install 'flwr[simulation]'``, which is not among fedalt's own requirements.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from typing import Any

import torch

from fedalt.benchmarks import workload
from fedalt.benchmarks.side_peft import PeftClient, PeftLora
from fedalt.benchmarks.task import Job, Outcome, Spec, require
from fedalt.runtime import peak_memory, usual_priority

_MEASURED = 2


def prepare_round(spec: Spec) -> Job:
    """Everything before the clock: Flower builds its clients in actors of its own."""
    require(spec.side)
    return Job(lambda: None, lambda: _simulate(spec))


@cache
def _client(text: str) -> PeftClient:
    """An actor's base and rows, built once in each actor."""
    torch.set_num_threads(1)
    return PeftClient(Spec.from_json(text))


def _train(message: Any, context: Any) -> Any:
    app = import_module("flwr.app")
    config = message.content["config"]
    client = _client(config["spec"])
    plan = client.plans[int(context.node_config["partition-id"])]
    arrays = message.content["arrays"].to_numpy_ndarrays()
    client.lora.install([torch.from_numpy(array.copy()) for array in arrays])
    plan = plan if config["server-round"] == _MEASURED else workload.first_step(plan)
    loss = client.train(plan)
    uploads = app.ArrayRecord([tensor.numpy() for tensor in client.lora.upload()])
    about = {
        "client": plan.client,
        "loss": loss,
        "num-examples": 1,
        "tokens": workload.all_tokens([plan]),
        "pid": os.getpid(),
        **peak_memory(),
    }
    content = app.RecordDict({"arrays": uploads, "metrics": app.MetricRecord(about)})
    return app.Message(content, reply_to=message)


def _simulate(spec: Spec) -> Outcome:
    usual_priority()
    app, serverapp = import_module("flwr.app"), import_module("flwr.serverapp")
    fedavg: Any = import_module("flwr.serverapp.strategy").FedAvg

    class Timed(fedavg):  # type: ignore[misc]
        """FedAvg that notes when each round starts and ends."""

        started = seconds = 0.0
        metrics: list[dict[str, Any]] = []  # noqa: RUF012

        def configure_train(self, *arguments: Any, **named: Any) -> Iterable[Any]:
            self.started = time.perf_counter()
            return super().configure_train(*arguments, **named)  # type: ignore[no-any-return]

        def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> Any:
            arrived = list(replies)
            result = super().aggregate_train(server_round, arrived)
            self.seconds = time.perf_counter() - self.started
            self.metrics = [dict(reply.content["metrics"]) for reply in arrived if reply.has_content()]
            return result

    size = {"min_train_nodes": spec.clients, "min_available_nodes": spec.clients}
    strategy = Timed(fraction_train=1.0, fraction_evaluate=0.0, **size)
    server, client = serverapp.ServerApp(), import_module("flwr.clientapp").ClientApp()

    def serve(grid: Any, context: Any) -> None:
        start = [value.numpy() for _, value in PeftLora(workload.skeleton(spec), spec.dropout, spec.seed).start]
        told = app.ConfigRecord({"spec": spec.to_json()})
        strategy.start(grid, app.ArrayRecord(start), num_rounds=_MEASURED, train_config=told)

    server.main()(serve)
    client.train()(_train)
    gpus = 1.0 if torch.cuda.is_available() else 0.0
    cores = {"num_cpus": spec.threads or os.cpu_count() or 1}
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": gpus}, "init_args": cores}
    import_module("flwr.simulation").run_simulation(
        server, client, num_supernodes=spec.clients, backend_config=resources
    )
    if len(strategy.metrics) < spec.clients:
        raise RuntimeError(f"Flower: {len(strategy.metrics)} of {spec.clients} clients replied in the measured round")
    actors = {one["pid"]: one for one in strategy.metrics}
    memory = {name: value + sum(int(one[name]) for one in actors.values()) for name, value in peak_memory().items()}
    losses = [one["loss"] for one in sorted(strategy.metrics, key=lambda one: one["client"])]
    tokens = sum(int(one["tokens"]) for one in strategy.metrics)
    return Outcome(tokens=tokens, values=losses, seconds=strategy.seconds, memory=memory)
