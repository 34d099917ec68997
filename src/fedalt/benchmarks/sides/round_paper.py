"""The paper's round, plainly: one client after another on one base, the official recipe, the official server.

Unlike the official code it does not load the base anew for every client and round, which is to its advantage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from fedalt.benchmarks import workload
from fedalt.benchmarks.sides.paper_layer import PaperModel
from fedalt.benchmarks.sides.plain import Collator, others_mean, train
from fedalt.benchmarks.task import Job, Outcome, Spec
from fedalt.benchmarks.workload import LORA, SCALE, Workload
from fedalt.data.batches import Plan
from fedalt.model.state import ClientState
from fedalt.names import INDIVIDUAL, Key, Tensors


@dataclass(frozen=True)
class Round:
    """A round that can be run again and again from the same start.

    Attributes:
        states: Every client as the last aggregation left it, its row in place.
    """

    spec: Spec
    model: PaperModel
    states: list[ClientState]
    collator: Collator

    def client(self, state: ClientState, plan: Plan) -> tuple[dict[Key, Tensor], float]:
        """One client: put its adapters on the base, train, take them off. Its tensors and its mean loss."""
        self.model.load(state.tensors)
        self.model.train(True)
        rows = [row for step in plan.steps for row in step]
        loader: Any = DataLoader(rows, self.spec.batch_size, collate_fn=self.collator)  # type: ignore[arg-type]
        config = workload.training(self.spec)
        loss = train(self.model.base, self.model.trainable, loader, len(plan.steps), config)
        return self.model.trained(), loss

    def whole(self, plans: Sequence[Plan]) -> tuple[list[dict[Key, Tensor]], list[float]]:
        """Every client, then every client's row."""
        trained, losses = zip(*(self.client(*one) for one in zip(self.states, plans, strict=True)), strict=True)
        uploads: list[Tensors] = [{k: v for k, v in mine.items() if k.slot == INDIVIDUAL} for mine in trained]
        if len(uploads) > 1:
            _ = [others_mean(uploads, k) for k in range(len(uploads))]
        return list(trained), list(losses)


def build(spec: Spec, work: Workload) -> Round:
    """Wrap the base."""
    model = PaperModel(work.base, LORA.r, SCALE, spec.dropout)
    states = workload.federation(spec, model.layer_sizes).installed()
    return Round(spec, model, states, Collator(work.tokenizer.pad_token_id))


def prepare(spec: Spec) -> Job:
    """Everything before the clock."""
    work = workload.load(spec)
    plans = work.plans()
    round_ = build(spec, work)
    first = workload.first_step(plans[0])

    def play() -> Outcome:
        return Outcome(tokens=workload.all_tokens(plans), values=round_.whole(plans)[1])

    return Job(lambda: round_.client(round_.states[0], first), play)
