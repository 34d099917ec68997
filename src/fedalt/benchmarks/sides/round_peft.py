"""PEFT and the Hugging Face Trainer: a fresh LoRA for each client, one client after another, FedAvg at the end.

The rows come in fedalt's order, batch by batch. The method is FedIT, not FedALT: one LoRA and no mixer.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor

from fedalt.benchmarks import workload
from fedalt.benchmarks.sides.peft_lora import PeftLora
from fedalt.benchmarks.sides.plain import Collator
from fedalt.benchmarks.task import Job, Outcome, Spec
from fedalt.data.batches import Plan


class PeftClient:
    """Trains one client after another on one ``PeftModel``."""

    def __init__(self, spec: Spec) -> None:
        from transformers import TrainingArguments

        work = workload.load(spec)
        config = workload.training(spec)
        self.plans = work.plans()
        self.lora = PeftLora(work.base, spec.dropout, spec.seed)
        self.collator = Collator(work.tokenizer.pad_token_id)
        self.arguments: Any = TrainingArguments(
            output_dir=tempfile.gettempdir(),  # nothing is saved
            per_device_train_batch_size=spec.batch_size,
            num_train_epochs=1,
            learning_rate=config.lr,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            lr_scheduler_type="linear",
            optim="adamw_torch",
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            bf16=torch.cuda.is_available() and spec.dtype == "bfloat16",  # as its users do
        )

    def train(self, plan: Plan) -> float:
        """Train the adapter that is on the model on one client's rows; the mean loss."""
        from transformers import PrinterCallback, Trainer

        rows: Any = [row for step in plan.steps for row in step]
        trainer = Trainer(
            model=self.lora.model,
            args=self.arguments,
            train_dataset=rows,
            data_collator=self.collator,
        )
        trainer.remove_callback(PrinterCallback)
        return float(trainer.train().training_loss)


def prepare(spec: Spec) -> Job:
    """Everything before the clock."""
    client = PeftClient(spec)

    def play() -> Outcome:
        uploads: list[list[Tensor]] = []
        losses = []
        for plan in client.plans:
            client.lora.reset()
            losses.append(client.train(plan))
            uploads.append(client.lora.upload())
        _ = [torch.stack(same).mean(0) for same in zip(*uploads, strict=True)]
        return Outcome(tokens=workload.all_tokens(client.plans), values=losses)

    return Job(lambda: client.train(workload.first_step(client.plans[0])), play)
