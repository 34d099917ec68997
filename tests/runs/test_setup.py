"""What is known of a run before its first step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedalt.config import EvaluationConfig, parse_config
from fedalt.evaluation.generate import answer
from fedalt.federation import client
from fedalt.model.fast import packing
from fedalt.model.fast.packing import NotPackable
from fedalt.runs.setup import Experiment, prepare
from micro import model_folder, settings


def test_the_user_is_told_why_rows_are_padded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*arguments: object, **options: object) -> torch.Tensor:
        raise NotPackable("some feature")

    plain = prepare(parse_config(settings(tmp_path / "run"), "x")).notes
    monkeypatch.setattr(packing, "attend", cannot)
    told = "rows are padded, not packed, on this model: NotPackable: some feature"
    for order, advice in (("strict", "; training.order=bucketed wastes less"), ("bucketed", "")):
        padded = prepare(parse_config(settings(tmp_path / "run", training__order=order), "x")).notes
        assert set(padded) - set(plain) == {told + advice}


def test_two_clients_of_a_higher_rank_need_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def needed(experiment: Experiment) -> int:
        """Least free memory, in steps of 4 KiB, with which two clients are on the model at a time."""
        for free in range(0, 1 << 30, 1 << 12):
            monkeypatch.setattr(client, "free_memory", lambda device, free=free: free)
            if experiment.fitting_cohort > 1:
                return free
        raise AssertionError("never")

    low, high = (prepare(parse_config(settings(tmp_path / "run", lora__r=rank), "x")) for rank in (2, 16))
    more = 4 * (high.shape.size() - low.shape.size())  # bytes of one client
    assert needed(high) - needed(low) > 2 * 2 * 2 * more  # two clients, two copies, half of what is free


def test_what_a_models_folder_says_of_answers_is_held_to_and_noted(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    plain = prepare(parse_config(settings(tmp_path / "run", folder), "x")).notes
    about = json.loads((folder / "generation_config.json").read_text())
    about |= {"do_sample": True, "repetition_penalty": 1.9, "num_return_sequences": 3}
    (folder / "generation_config.json").write_text(json.dumps(about))
    experiment = prepare(parse_config(settings(tmp_path / "run", folder), "x"))
    first, second = (note for note in experiment.notes if note not in plain)
    assert first.startswith("the model's folder sets repetition_penalty=1.9: held to")
    assert second == "the model's folder asks for num_return_sequences=3: one answer is given and scored"
    model, tokenizer = experiment.resident.model, experiment.resident.base.tokenizer
    model.load([experiment.initial_state(0)], experiment.settings.answering)
    prompts = [example.prompt for example in experiment.examples[0].test]
    config = EvaluationConfig(max_new_tokens=12)
    told = answer(model, tokenizer, prompts, [0] * len(prompts), config)
    alone = AutoModelForCausalLM.from_pretrained(folder).eval()  # B is 0 before the first round
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for prompt, text in zip(prompts, told, strict=True):
        ids = torch.tensor([prompt])
        out = alone.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            num_return_sequences=1,
            **ends,
        )
        assert tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip() == text
