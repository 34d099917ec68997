"""The paper's own way, in plain torch: its layer, round, answers and aggregation.

Where it differs from the official code, that is to its advantage: the base is not loaded anew for every client and
round; answers have an attention mask and stop at the end of sequence, without which they would be others, or cost as
much as the longest. In an aggregation of more than eight clients it serves eight of them, from all uploads, and the
time of all is extrapolated: every client costs the same. Memory is what was measured, plus the rows of the clients that
were not served, all of which the official server holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fedalt.benchmarks import workload
from fedalt.benchmarks.task import Job, Outcome, Spec
from fedalt.benchmarks.workload import LORA, SCALE, SERVED, Workload, answer_settings, digests, norm, shape, upload
from fedalt.config import EvaluationConfig, TrainingConfig
from fedalt.data.batches import Plan, pad_prompts
from fedalt.data.encode import Example, Prompt
from fedalt.model.layer import features
from fedalt.model.state import ClientState
from fedalt.model.targets import find_targets
from fedalt.names import INDIVIDUAL, MIXER, REST_OF_WORLD, A, B, G, Key, Tensors

IGNORED = -100
MULTIPLE = 8
"""The official collator pads to a multiple of 8."""


class Collator:
    """Pads a batch to its longest row, rounded up to a multiple of 8; prompts and padding are not supervised.

    On the right, where the official code pads left: the same amount of work, and models with learned positions then see
    the positions that fedalt shows them.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        """Ids, mask and labels of some rows."""
        width = -(-max(map(len, rows)) // MULTIPLE) * MULTIPLE
        ids = torch.full((len(rows), width), self.pad)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED)
        for n, row in enumerate(rows):
            ids[n, : len(row)] = torch.tensor(row.prompt + row.answer)
            mask[n, : len(row)] = 1
            labels[n, len(row.prompt) : len(row)] = torch.tensor(row.answer)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Optimizer:
    """``torch.optim.AdamW`` with gradient clipping and the learning rate falling linearly to 0."""

    def __init__(self, parameters: Sequence[nn.Parameter], steps: int, config: TrainingConfig) -> None:
        self.parameters = parameters
        self.limit = config.max_grad_norm
        self.adamw = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.adamw, lambda step: max(0.0, 1 - step / steps))

    def step(self, loss: Tensor) -> None:
        """Backward, clip, step."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.limit)
        self.adamw.step()
        self.schedule.step()
        self.adamw.zero_grad()


def own_loss(base: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's own loss, over the logits of all positions."""
    loss: Tensor = base(**batch, use_cache=False).loss
    return loss


def answer_loss(base: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """The same number from the logits of answer positions alone."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = base.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]  # [n, t - 1, d]
    labels = batch["labels"][:, 1:]
    answer = labels != IGNORED
    return F.cross_entropy(base.get_output_embeddings()(hidden[answer]).float(), labels[answer])


def train(
    base: Any,
    parameters: Sequence[nn.Parameter],
    batches: Iterable[Mapping[str, Tensor]],
    steps: int,
    config: TrainingConfig,
    *,
    loss_of: Callable[[Any, Mapping[str, Tensor]], Tensor] = own_loss,
) -> float:
    """The plain loop; the mean loss of its steps."""
    optimizer = Optimizer(parameters, steps, config)
    device = next(base.parameters()).device
    losses = []
    for batch in batches:
        loss = loss_of(base, {name: value.to(device) for name, value in batch.items()})
        optimizer.step(loss)
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def others_mean(uploads: Sequence[Tensors], client: int) -> dict[Key, Tensor]:
    """The official server: stack everybody else's tensor, take the mean, tensor by tensor."""
    return {
        key: torch.stack([upload[key] for k, upload in enumerate(uploads) if k != client]).mean(0)
        for key in uploads[client]
    }


def silence(base: nn.Module) -> None:
    """Take the base's own dropout out, for libraries that put the whole model into training mode."""
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


class DualLora(nn.Module):
    """Two LoRAs beside a frozen layer, weighed per token by a softmax mixer.

        y = W0 x + Σ_i α_i(x) · s · B_i A_i drop(x),   α = softmax(G x) in fp32

    One dropout mask serves both LoRAs, the mixer sees x undropped, and the terms are added one after another. As PEFT
    does, adapters are fp32 whatever the base is.
    """

    def __init__(self, base_layer: nn.Module, r: int, scale: float, dropout: float) -> None:
        super().__init__()
        d_in, d_out = features(base_layer)
        self.base_layer = base_layer
        self.lora_a = nn.ModuleList(nn.Linear(d_in, r, bias=False) for _ in (INDIVIDUAL, REST_OF_WORLD))
        self.lora_b = nn.ModuleList(nn.Linear(r, d_out, bias=False) for _ in (INDIVIDUAL, REST_OF_WORLD))
        self.mixer = nn.Linear(d_in, 2, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.scale = scale
        for module in (self.lora_a[1], self.lora_b[1]):
            module.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus both LoRAs."""
        base: Tensor = self.base_layer(x)
        x = x.to(self.mixer.weight.dtype)
        weights = torch.softmax(self.mixer(x), dim=-1, dtype=torch.float32)
        dropped = self.dropout(x)
        result = base
        for i, (down, up) in enumerate(zip(self.lora_a, self.lora_b, strict=True)):
            result = result + weights[..., i].unsqueeze(-1) * up(down(dropped)) * self.scale
        return result.to(base.dtype)

    def weight_of(self, slot: str, factor: str) -> Tensor:
        """The weight behind a slot and factor."""
        if slot == MIXER:
            return self.mixer.weight
        layer = (self.lora_a if factor == A else self.lora_b)[(INDIVIDUAL, REST_OF_WORLD).index(slot)]
        return layer.weight  # type: ignore[return-value]


class PaperModel:
    """A frozen base with the paper's layer on its targets, for one client at a time."""

    def __init__(self, base: Any, r: int, scale: float, dropout: float) -> None:
        self.base = base.eval().requires_grad_(False)
        self.device = next(base.parameters()).device
        self.layers: dict[str, DualLora] = {}
        for path in find_targets(base):
            self.layers[path] = DualLora(base.get_submodule(path), r, scale, dropout).to(self.device)
            base.set_submodule(path, self.layers[path])

    @property
    def layer_sizes(self) -> dict[str, tuple[int, int]]:
        """Module path → (d_in, d_out) of every adapted layer."""
        return {path: features(layer.base_layer) for path, layer in self.layers.items()}

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Individual LoRA and mixer of every layer."""
        return [p for layer in self.layers.values() for p in layer.parameters() if p.requires_grad]

    def train(self, mode: bool) -> None:
        """Switch adapter dropout; the base stays in eval mode, on every side."""
        self.base.eval()
        for layer in self.layers.values():
            layer.dropout.train(mode)

    @torch.no_grad()
    def load(self, tensors: Tensors) -> None:
        """Take over one client's adapters."""
        for key, value in tensors.items():
            self.layers[key.module].weight_of(key.slot, key.factor).copy_(value)

    def trained(self) -> dict[Key, Tensor]:
        """Copies of what the client trains, as the official code takes them."""
        kept = ((INDIVIDUAL, A), (INDIVIDUAL, B), (MIXER, G))
        return {
            Key(path, slot, factor): layer.weight_of(slot, factor).detach().clone()
            for path, layer in self.layers.items()
            for slot, factor in kept
        }


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


def prepare_round(spec: Spec) -> Job:
    """Everything before the clock."""
    work = workload.load(spec)
    plans = work.plans()
    round_ = build(spec, work)
    first = workload.first_step(plans[0])

    def play() -> Outcome:
        return Outcome(tokens=workload.all_tokens(plans), values=round_.whole(plans)[1])

    return Job(lambda: round_.client(round_.states[0], first), play)


_TOGETHER = 2
"""``EVAL_BATCH_SIZE`` of the official code."""


def prepare_evaluation(spec: Spec) -> Job:
    """Everything before the clock."""
    work = workload.load(spec)
    model = PaperModel(work.base, LORA.r, SCALE, spec.dropout)
    model.train(False)
    states, prompts = workload.federation(spec, model.layer_sizes).installed(), work.prompts()
    config = answer_settings(spec)

    def play() -> Outcome:
        answers = []
        for state, mine in zip(states, prompts, strict=True):
            model.load(state.tensors)
            answers.append(_answer(model, work, mine, config))
        return Outcome(answers=digests(answers))

    def warm_up() -> None:
        _answer(model, work, prompts[0][:_TOGETHER], config.model_copy(update={"max_new_tokens": 1}))

    return Job(warm_up, play)


@torch.no_grad()
def _answer(model: PaperModel, work: Workload, prompts: Sequence[Prompt], config: EvaluationConfig) -> list[str]:
    answers: list[str] = []
    for start in range(0, len(prompts), _TOGETHER):
        ids, mask = pad_prompts(prompts[start : start + _TOGETHER], work.tokenizer.pad_token_id)
        out = model.base.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=config.max_new_tokens,
            num_beams=config.num_beams,
            do_sample=False,
            pad_token_id=work.tokenizer.pad_token_id,
            eos_token_id=work.tokenizer.eos_token_id,
        )
        answers += work.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in answers]


def prepare_aggregation(spec: Spec) -> Job:
    """Everything before the clock."""
    adapters = shape(spec)
    all_: list[Tensors] = [upload(spec, adapters, client) for client in range(spec.clients)]
    served = min(spec.clients, SERVED)

    def play() -> Outcome:
        rows = [others_mean(all_, k) for k in range(served)]
        size = sum(value.numel() * value.element_size() for value in rows[0].values())
        unserved = (spec.clients - served) * size
        return Outcome(values=[norm(row) for row in rows], scale=spec.clients / served, more_memory=unserved)

    return Job(lambda: others_mean(all_[:2], 0), play)
