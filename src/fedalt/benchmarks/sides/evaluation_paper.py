"""The official way to answer: client after client on the paper's layer, two prompts at a time, in file order.

Unlike the official code it passes an attention mask and stops at the end of sequence: without the mask answers would be
others, and without the stop every answer would cost as much as the longest. Both are to its advantage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedalt.benchmarks import workload
from fedalt.benchmarks.sides.answers import digests, settings
from fedalt.benchmarks.sides.paper_layer import PaperModel
from fedalt.benchmarks.task import Job, Outcome, Spec
from fedalt.benchmarks.workload import LORA, SCALE, Workload
from fedalt.config import EvaluationConfig
from fedalt.data.batches import pad_prompts
from fedalt.data.encode import Prompt

_TOGETHER = 2
"""``EVAL_BATCH_SIZE`` of the official code."""


def prepare(spec: Spec) -> Job:
    """Everything before the clock."""
    work = workload.load(spec)
    model = PaperModel(work.base, LORA.r, SCALE, spec.dropout)
    model.train(False)
    states, prompts = workload.federation(spec, model.layer_sizes).installed(), work.prompts()
    config = settings(spec)

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
