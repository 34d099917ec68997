"""fedalt's own round: all clients in one stack, or one after another. Serves ``round``, ``memory`` and ``step``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from fedalt.allocator import keep_freed_memory
from fedalt.benchmarks import workload
from fedalt.benchmarks.task import Job, Outcome, Spec
from fedalt.benchmarks.workload import ROUND, Federation
from fedalt.data.batches import Plan
from fedalt.federation.client import ClientResult, RoundSettings
from fedalt.federation.cohort import fitting_cohort
from fedalt.federation.executor import run_clients
from fedalt.methods.budget import trainable
from fedalt.model.adapted import AdaptedModel


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
                self.settings,
                ROUND,
                cohort,
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


def prepare(spec: Spec) -> Job:
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
