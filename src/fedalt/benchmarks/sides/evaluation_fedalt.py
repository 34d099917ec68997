"""fedalt's own answers: all clients' prompts in one generation batch."""

from __future__ import annotations

from fedalt.allocator import keep_freed_memory
from fedalt.benchmarks import workload
from fedalt.benchmarks.sides.answers import digests, settings
from fedalt.benchmarks.task import Job, Outcome, Spec
from fedalt.benchmarks.workload import SCALE
from fedalt.evaluation.generate import answer_all
from fedalt.model.adapted import AdaptedModel
from fedalt.model.layer import Placement


def prepare(spec: Spec) -> Job:
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
        return Outcome(answers=digests(answer_all(model, work.tokenizer, prompts, settings(spec))))

    def warm_up() -> None:
        model.load(states, placement)
        short = settings(spec).model_copy(update={"max_new_tokens": 1})
        answer_all(model, work.tokenizer, [mine[:1] for mine in prompts], short)

    return Job(warm_up, play)
