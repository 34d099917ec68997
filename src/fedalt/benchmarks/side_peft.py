"""Clients one after another with PEFT: a round, and a single step.

Rows come in fedalt's order, batch by batch. The method of a round is FedIT, not FedALT: one LoRA and no mixer. In a
step, ``peft`` is given fedalt's loss: logits at answer positions only; ``peft-forward`` is PEFT as it comes, with the
model's own loss over all logits.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from fedalt.benchmarks import workload
from fedalt.benchmarks.side_paper import Collator, answer_loss, own_loss, silence, train
from fedalt.benchmarks.task import Job, Outcome, Spec
from fedalt.benchmarks.workload import LORA
from fedalt.config import RunConfig
from fedalt.data.batches import Plan
from fedalt.methods.registry import build
from fedalt.model.layer import features
from fedalt.model.state import initial_state
from fedalt.model.targets import find_targets
from fedalt.names import A


class PeftLora:
    """A ``PeftModel`` with one adapter, which starts anew for every client."""

    def __init__(self, base: Any, dropout: float, seed: int) -> None:
        from peft import LoraConfig, get_peft_model

        silence(base)
        sizes = {path: features(base.get_submodule(path)) for path in find_targets(base)}
        config = LoraConfig(r=LORA.r, lora_alpha=int(LORA.alpha), lora_dropout=dropout, target_modules=list(sizes))
        self.base = base
        self.model: Any = get_peft_model(base, config)
        start = initial_state(build(RunConfig(method="fedit"), 1, sizes).shape, 0, seed, LORA.init, LORA.mixer_init)
        self.start: list[tuple[nn.Parameter, Tensor]] = []
        for key, value in start.tensors.items():
            layer = base.get_submodule(key.module)
            self.start.append(((layer.lora_A if key.factor == A else layer.lora_B)["default"].weight, value))

    @property
    def trainable(self) -> list[nn.Parameter]:
        """A and B of every layer."""
        return [parameter for parameter, _ in self.start]

    @torch.no_grad()
    def reset(self) -> None:
        """A fresh adapter."""
        for parameter, value in self.start:
            parameter.copy_(value)

    @torch.no_grad()
    def install(self, tensors: list[Tensor]) -> None:
        """Overwrite A and B of every layer."""
        for parameter, value in zip(self.trainable, tensors, strict=True):
            parameter.copy_(value)

    def upload(self) -> list[Tensor]:
        """Copies of A and B of every layer."""
        return [parameter.detach().cpu().clone() for parameter in self.trainable]


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


def prepare_round(spec: Spec) -> Job:
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


def prepare_step(spec: Spec) -> Job:
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
        return train(lora.base, lora.trainable, batches, len(plan.steps), config, loss_of=loss)

    def play() -> Outcome:
        return Outcome(units=len(plan.steps), tokens=workload.all_tokens([plan]), values=[steps(plan)])

    return Job(lambda: steps(workload.first_step(plan)), play)
