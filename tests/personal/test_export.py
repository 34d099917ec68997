"""What is taken away: a merged model is an ordinary folder, and whole or not there."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    pipeline,
)

from fedalt.config import load_config
from fedalt.errors import UserError
from fedalt.model.layer import features
from fedalt.model.targets import is_linear
from fedalt.personal.export import export_merged, export_static
from micro import (
    call,
    finished,
    labelled_data,
    micro_model,
    refused,
    settings,
    shared_classifier,
    shared_model,
    write_yaml,
)
from support import relative

PROMPT = "### Instruction:\nIs 3 more than 1? (0.4)\n\n### Response:\n"
IDS = torch.randint(2, 300, (3, 12), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


@cache
def classified() -> Path:
    out = finished().parent / "classified"
    changes = {"model__task": "sequence_classification", "federation__rounds": 1}
    values = settings(out, shared_classifier(), labelled_data(), **changes)
    assert call("run", write_yaml(out.parent / "classified.yaml", values)).code == 0
    return out


@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2"])
def test_a_merged_model_loads_alone_and_says_what_the_static_lora_says(tmp_path: Path, kind: str) -> None:
    run = finished("fedalt", kind)
    cost = export_merged(run, 1, tmp_path / "merged")
    assert cost == export_static(run, 1, tmp_path / "static")
    base = AutoModelForCausalLM.from_pretrained(shared_model(kind)).eval()
    plain = logits(base)
    expected = logits(PeftModel.from_pretrained(base, str(tmp_path / "static")))
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert relative(merged, expected) < 1e-5
    assert (merged - plain).abs().max() > 1e-2
    words = AutoTokenizer.from_pretrained(tmp_path / "merged")
    (said,) = pipeline("text-generation", str(tmp_path / "merged"))(PROMPT, max_new_tokens=5, do_sample=False)
    ids = words(PROMPT, return_tensors="pt")["input_ids"]
    (answered,) = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "static").generate(
        input_ids=ids, max_new_tokens=5, do_sample=False
    )
    assert said["generated_text"] == words.decode(answered, skip_special_tokens=True)
    assert words("Is 3 more than 1?") == AutoTokenizer.from_pretrained(shared_model(kind))("Is 3 more than 1?")
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == 1


def test_a_merged_classifier_has_the_clients_head(tmp_path: Path) -> None:
    export_static(classified(), 1, tmp_path / "static")
    export_merged(classified(), 1, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert set(merged.config.id2label.values()) == {"small", "middling", "large"}
    base = AutoModelForSequenceClassification.from_pretrained(shared_classifier(), num_labels=3)
    expected = logits(PeftModel.from_pretrained(base, str(tmp_path / "static")))
    assert relative(logits(merged), expected) < 1e-5


def test_full_matrices_can_be_merged_where_one_lora_cannot_hold_them(tmp_path: Path) -> None:
    run = finished("flora")
    with pytest.raises(UserError, match="use --merge"):
        export_static(run, 1, tmp_path / "static")
    assert not any(tmp_path.iterdir())
    cost = export_merged(run, 1, tmp_path / "merged")
    assert cost.static == cost.personal
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_the_card_and_the_dtype_of_a_merged_model(tmp_path: Path) -> None:
    to = tmp_path / "merged"
    done = call("export", finished(), "--client", 1, "--to", to, "--merge", "--dtype", "bf16")
    assert done.code == 0, done.err
    assert AutoModelForCausalLM.from_pretrained(to, dtype="auto").dtype == torch.bfloat16
    card = (to / "README.md").read_text()
    for part in (
        "base alone",
        "personal model",
        "this model",
        "`fedalt`",
        "12 for training",
        "--merge --dtype bfloat16",
    ):
        assert part in card, part


@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2"])
def test_a_static_lora_keeps_to_vllms_rules(tmp_path: Path, kind: str) -> None:
    """Those of ``PEFTHelper.validate_legal``, ``LoRAModel.from_local_checkpoint`` and ``LoRAConfig`` in its source.

    The rank is at most ``--max-lora-rank``. No module is saved whole, no bias, no DoRA, no rank or alpha of a layer's
    own; the scale is alpha over the rank. Every tensor is one factor of a linear layer that the base has.
    """
    run = finished("fedalt", kind)
    export_static(run, 1, tmp_path / "lora")
    about = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= about.keys() and about["r"] <= 512
    assert about["bias"] == "none"
    own = ("modules_to_save", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "trainable_token_indices")
    assert not any(about.get(name) for name in own)
    lora = load_config(run / "config.yaml").lora
    assert math.isclose(about["lora_alpha"] / about["r"], lora.scale(lora.r))
    linear = {path: features(module) for path, module in micro_model(kind).named_modules() if is_linear(module)}
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, value in tensors.items():
        stem, _, factor = name.removesuffix(".weight").rpartition(".")
        d_in, d_out = linear[stem.removeprefix("base_model.model.")]
        assert tuple(value.shape) == {"lora_A": (about["r"], d_in), "lora_B": (d_out, about["r"])}[factor], name
    assert {name.replace("lora_A", "lora_B") for name in tensors} <= tensors.keys()


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    to = tmp_path / "x"
    assert "give one of them" in refused("export", finished(), "--client", 1, "--to", to, "--merge", "--static")
    assert "--dtype is for --merge" in refused("export", finished(), "--client", 1, "--to", to, "--dtype", "bf16")
    assert not to.exists()


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedalt.personal.export.merge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for to in (tmp_path / "new", tmp_path / "empty"):
        if to.name == "empty":
            to.mkdir()
        with pytest.raises(KeyboardInterrupt):
            export_merged(finished(), 1, to)
        assert not list(tmp_path.rglob("*.*"))
