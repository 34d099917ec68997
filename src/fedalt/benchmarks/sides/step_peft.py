"""The same step with one plain PEFT LoRA of the same rank on the same batch: what the second LoRA and the mixer cost.

``peft`` is given fedalt's loss: logits at answer positions only. ``peft-forward`` is PEFT as it comes, with the model's
own loss over all logits.
"""

from __future__ import annotations

from fedalt.benchmarks import workload
from fedalt.benchmarks.sides.peft_lora import PeftLora
from fedalt.benchmarks.sides.plain import Collator, answer_loss, own_loss, train
from fedalt.benchmarks.task import Job, Outcome, Spec
from fedalt.data.batches import Plan


def prepare(spec: Spec) -> Job:
    """Everything before the clock."""
    work = workload.load(spec)
    plan = work.plans()[0]
    lora = PeftLora(work.base, spec.dropout, spec.seed)
    lora.reset()
    lora.model.train()
    collate, config = Collator(work.tokenizer.pad_token_id), workload.training(spec)

    def steps(plan: Plan) -> float:
        batches = (collate(rows) for rows in plan.steps)
        loss = own_loss if spec.side == "peft-forward" else answer_loss
        return train(lora.base, lora.trainable, batches, len(plan.steps), config, loss)

    def play() -> Outcome:
        return Outcome(units=len(plan.steps), tokens=workload.all_tokens([plan]), values=[steps(plan)])

    return Job(lambda: steps(workload.first_step(plan)), play)
