"""fedalt's own side of ``round``, ``memory``, ``step``, ``evaluation`` and ``aggregation``.

A round has all clients in one stack, or one after another; answers are made in one generation batch of all clients. In
an aggregation, uploads are in files, as those of a run are, and are read one at a time; reading them is timed, writing
them is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

from safetensors.torch import load_file, save_file

from fedalt.benchmarks import workload
from fedalt.benchmarks.task import Job, Outcome, Spec
from fedalt.benchmarks.workload import ROUND, SCALE, SERVED, Federation, answer_settings, digests, norm, shape, upload
from fedalt.config import FederationConfig, RunConfig
from fedalt.data.batches import Plan
from fedalt.evaluation.generate import answer_all
from fedalt.federation.client import ClientResult, RoundSettings, fitting_cohort, run_clients
from fedalt.federation.server import Server
from fedalt.methods.base import trainable
from fedalt.methods.registry import build as registry_build
from fedalt.model.adapted import AdaptedModel
from fedalt.model.layer import Placement
from fedalt.model.state import ClientState
from fedalt.names import REST_OF_WORLD, Key, Tensors
from fedalt.runtime import keep_freed_memory


@dataclass(frozen=True)
class Round:
    """A round that can be run again and again from the same start."""

    spec: Spec
    model: AdaptedModel
    federation: Federation
    settings: RoundSettings

    def train(self, plans: Sequence[Plan]) -> list[ClientResult]:
        """Install the server's messages and train every client."""
        world = self.federation
        states = {state.client: state for state in world.states}
        lengths = [mean(len(row) for step in plan.steps for row in step) for plan in plans]
        sizes = (world.shape.size(), trainable(world.method))
        fitting = self.spec.cohort or fitting_cohort(self.model, lengths, self.spec.batch_size, *sizes)
        cohort = 1 if self.spec.side == "loop" else fitting
        by_client = {plan.client: plan for plan in plans}
        return list(
            run_clients(
                self.model,
                tuple(states),
                states,
                world.messages,
                lambda client: [by_client[client]],
                settings=self.settings,
                round_=ROUND,
                cohort=cohort,
            )
        )

    def whole(self, plans: Sequence[Plan]) -> list[ClientResult]:
        """Train, upload, aggregate."""
        results = self.train(plans)
        server = self.federation.server
        uploads = {result.state.client: result.upload for result in results}
        server.receive(uploads, uploads.__getitem__, ROUND)
        server.messages(tuple(server.uploads))
        return results


def build(spec: Spec, work: workload.Workload) -> Round:
    """Wrap the base and set the clients up."""
    model = AdaptedModel(work.base)
    world = workload.federation(spec, model.layer_sizes)
    settings = RoundSettings(world.method, workload.training(spec))
    return Round(spec, model, world, settings)


def prepare_round(spec: Spec) -> Job:
    """Everything before the clock."""
    keep_freed_memory()  # as the command does
    work = workload.load(spec)
    plans = work.plans()
    round_ = build(spec, work)

    def play() -> Outcome:
        results = round_.whole(plans)
        steps = len(plans[0].steps) if spec.what == "step" else 1
        losses = [] if spec.what == "memory" else [result.stats.loss for result in results]  # one client has no row
        return Outcome(units=steps, tokens=workload.all_tokens(plans), values=losses)

    return Job(lambda: round_.train([workload.first_step(plan) for plan in plans]), play)


def prepare_evaluation(spec: Spec) -> Job:
    """Everything before the clock."""
    keep_freed_memory()  # as the command does
    work = workload.load(spec)
    model = AdaptedModel(work.base)
    model.train(False)
    world = workload.federation(spec, model.layer_sizes)
    placement = Placement(*world.method.inference, SCALE, spec.dropout)
    states, prompts = world.installed(), work.prompts()

    def play() -> Outcome:
        model.load(states, placement)
        return Outcome(answers=digests(answer_all(model, work.tokenizer, prompts, answer_settings(spec))))

    def warm_up() -> None:
        model.load(states, placement)
        short = answer_settings(spec).model_copy(update={"max_new_tokens": 1})
        answer_all(model, work.tokenizer, [mine[:1] for mine in prompts], short)

    return Job(warm_up, play)


def prepare_aggregation(spec: Spec) -> Job:
    """Everything before the clock."""
    adapters = shape(spec)
    method = registry_build(RunConfig(), spec.clients)
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
