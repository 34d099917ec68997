"""A client's folder is ordinary: PEFT loads it, and so do twenty lines that have never heard of fedalt."""

from __future__ import annotations

import dataclasses
import json
import shutil
import stat
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedalt.config import ModelConfig
from fedalt.data.federation import Row
from fedalt.data.record import row_digest
from fedalt.errors import UserError
from fedalt.model.base import fingerprint, load_base
from fedalt.model.peft_files import LoraFolder, read_folder, write_lora
from fedalt.names import INDIVIDUAL, MIXER, REST_OF_WORLD, A, B, G, Key
from fedalt.personal.export import export_static
from fedalt.runs.client_folder import client_ids, read_client
from fedalt.runs.folder import RunFolder
from micro import CLIENTS, answers, finished, shared_data, shared_model
from support import relative

KINDS = ("llama", "bloom", "gpt2")
MODULES = {
    "llama": [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"],
    "bloom": [f"transformer.h.{i}.self_attention.query_key_value" for i in (0, 1)],
    "gpt2": [f"transformer.h.{i}.attn.c_attn" for i in (0, 1)],
}
SIZES = {"llama": {"q": (32, 32), "v": (32, 16)}, "bloom": {"query_key_value": (32, 96)}, "gpt2": {"c_attn": (32, 96)}}
RANK = 4
PROMPT = "### Instruction:\n{}\n\n### Response:\n"


def client_folder(kind: str = "llama", client: int = 1, method: str = "fedalt") -> Path:
    return finished(method, kind) / "clients" / str(client)


def base_of(kind: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(shared_model(kind), dtype=torch.float32).eval()


def some_ids() -> Tensor:
    return torch.randint(2, 300, (3, 12), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------ what is in the folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_of_a_client(kind: str) -> None:
    folder = client_folder(kind)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    lora = ("adapter_config.json", "adapter_model.safetensors")
    assert names == {
        *(f"{slot}/{name}" for slot in ("individual", "rest_of_world") for name in lora),
        "mixer.safetensors",
        "fedalt_config.json",
    }


@pytest.mark.parametrize("method", ["local", "fedit"])
def test_a_method_without_mixer_writes_one_lora_and_no_mixer(method: str) -> None:
    folder, slot = client_folder(method=method), {"local": "individual", "fedit": "global"}[method]
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {f"{slot}/adapter_config.json", f"{slot}/adapter_model.safetensors", "fedalt_config.json"}
    about = json.loads((folder / "fedalt_config.json").read_text())
    assert (about["method"], about["slots"], about["mixer_order"]) == (method, [slot], None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slot", ["individual", "rest_of_world"])
def test_keys_and_shapes_are_pefts(kind: str, slot: str) -> None:
    tensors = load_file(client_folder(kind) / slot / "adapter_model.safetensors")
    expected = {}
    for module in MODULES[kind]:
        d_in, d_out = SIZES[kind][module.rsplit(".", 1)[1].removesuffix("_proj")]
        expected[f"base_model.model.{module}.lora_A.weight"] = (RANK, d_in)
        expected[f"base_model.model.{module}.lora_B.weight"] = (d_out, RANK)
    assert {name: tuple(value.shape) for name, value in tensors.items()} == expected
    assert {value.dtype for value in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_mixer_keys_and_shapes(kind: str) -> None:
    tensors = load_file(client_folder(kind) / "mixer.safetensors")
    expected = {f"base_model.model.{module}.mixer.weight": (2, 32) for module in MODULES[kind]}
    assert {name: tuple(value.shape) for name, value in tensors.items()} == expected


@pytest.mark.parametrize("file", ["individual/adapter_model.safetensors", "mixer.safetensors"])
def test_files_say_that_they_are_pytorch_and_can_be_read_by_others(file: str) -> None:
    path = client_folder() / file
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444 & ~_umask()


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slot", ["individual", "rest_of_world"])
def test_adapter_config_holds_pefts_keys_only_and_names_the_base(kind: str, slot: str) -> None:
    about = json.loads((client_folder(kind) / slot / "adapter_config.json").read_text())
    known = {field.name for field in dataclasses.fields(LoraConfig)} | {"peft_version"}
    assert set(about) <= known
    assert (about["r"], about["lora_alpha"], about["task_type"], about["peft_type"]) == (4, 16, "CAUSAL_LM", "LORA")
    assert about["target_modules"] == sorted(MODULES[kind])
    assert about["fan_in_fan_out"] is (kind == "gpt2")
    named = AutoModelForCausalLM.from_pretrained(about["base_model_name_or_path"], dtype=torch.float32)
    assert fingerprint(named) == fingerprint(base_of(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_fedalt_config(kind: str) -> None:
    about = json.loads((client_folder(kind, client=2) / "fedalt_config.json").read_text())
    assert about["method"] == "fedalt"
    assert about["client_id"] == 2
    assert about["round"] == 3
    assert about["scale"] == 4.0
    assert about["mixer_order"] == ["individual", "rest_of_world"]
    assert about["slots"] == ["individual", "rest_of_world"]
    assert about["template"] == "alpaca_short"
    assert about["base"]["sha256"] == fingerprint(base_of(kind))
    assert about["base"]["source"] == str(shared_model(kind))


# -------------------------------------------------------------------------------------------------------- PEFT loads it


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_both_loras_bit_for_bit_and_without_a_warning(kind: str) -> None:
    folder = client_folder(kind)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base_of(kind), folder / "individual", adapter_name="individual")
        model.load_adapter(folder / "rest_of_world", "rest_of_world")
    assert [str(w.message) for w in said if "gradient_checkpointing" not in str(w.message)] == []
    seen = 0
    for slot in ("individual", "rest_of_world"):
        for name, value in load_file(folder / slot / "adapter_model.safetensors").items():
            placed = model.get_parameter(name.replace(".weight", f".{slot}.weight"))
            assert torch.equal(placed, value)
            seen += 1
        layer = model.get_submodule(f"base_model.model.{MODULES[kind][0]}")
        assert layer.scaling[slot] == 4.0
    assert seen == 4 * len(MODULES[kind])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["local", "fedit"])
def test_without_a_mixer_peft_alone_gives_the_runs_answers(kind: str, method: str) -> None:
    slot = {"local": "individual", "fedit": "global"}[method]
    for client in range(CLIENTS):
        model = AutoPeftModelForCausalLM.from_pretrained(
            client_folder(kind, client, method) / slot, dtype=torch.float32
        )
        lines = answers(finished(method, kind), 3, [client])
        assert reply(model.eval(), shared_model(kind), lines) == [line["answer"] for line in lines]


# -------------------------------------------------------------------------------- somebody else's twenty lines of torch


def adapt(
    module: Any, inputs: tuple[Tensor], y: Tensor, key: str, loras: list[dict[str, Tensor]], g: Any, s: Any
) -> Any:
    """y + s · Σ_i α_i(x) B_i A_i x, with α = softmax(G x) where there is a mixer."""
    x = inputs[0]
    alpha = (x @ g.T).softmax(-1) if g is not None else torch.ones(len(loras))
    outputs = [x @ t[f"{key}.lora_A.weight"].T @ t[f"{key}.lora_B.weight"].T for t in loras]
    return y + s * sum(alpha[..., i : i + 1] * out for i, out in enumerate(outputs))


def personal_model(folder: Path) -> tuple[Any, str]:
    """Load a client's folder with torch, transformers and safetensors."""
    about = json.loads((folder / "fedalt_config.json").read_text())
    lora = json.loads((folder / about["slots"][0] / "adapter_config.json").read_text())
    source = lora["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    order = about["mixer_order"] or about["slots"]
    loras = [load_file(folder / slot / "adapter_model.safetensors") for slot in order]
    mixer = load_file(folder / "mixer.safetensors") if about["mixer_order"] else {}
    for name, module in model.named_modules():
        key = f"base_model.model.{name}"
        if f"{key}.lora_A.weight" in loras[0]:
            g = mixer.get(f"{key}.mixer.weight")
            module.register_forward_hook(partial(adapt, key=key, loras=loras, g=g, s=about["scale"]))
    return model, source


def reply(model: Any, source: Path | str, lines: list[dict[str, Any]]) -> list[str]:
    """Greedy answers, one prompt at a time, so that no padding is involved."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = []
    for line in lines:
        ids = tokenizer(PROMPT.format(line["text"]), return_tensors="pt")
        out = model.generate(
            input_ids=ids["input_ids"],
            attention_mask=ids["attention_mask"],
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return texts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("client", range(CLIENTS))
def test_twenty_lines_of_plain_torch_reproduce_the_predictions(kind: str, client: int) -> None:
    lines = answers(finished("fedalt", kind), 3, [client])
    assert reply(*personal_model(client_folder(kind, client)), lines) == [line["answer"] for line in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_the_predictions_are_of_the_adapters_and_not_of_the_base(kind: str) -> None:
    """Otherwise the test above could not fail."""
    lines = answers(finished("fedalt", kind), 3)
    own = [line["answer"] for line in lines]
    assert reply(base_of(kind), shared_model(kind), lines) != own
    assert any(own)
    other = reply(*personal_model(client_folder(kind, 0)), lines)
    assert other != own, "client 0's model is not everybody's"


def test_the_order_of_the_mixer_matters(tmp_path: Path) -> None:
    """Exchanged mixer rows give another model, so the order in the file is not decoration."""
    shutil.copytree(client_folder(), tmp_path / "client")
    path = tmp_path / "client" / "mixer.safetensors"
    save_file({name: value.flip(0).contiguous() for name, value in load_file(path).items()}, path)
    with torch.no_grad():
        right, wrong = (personal_model(f)[0](some_ids()).logits for f in (client_folder(), tmp_path / "client"))
    assert (right - wrong).abs().max() > 1e-3


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", KINDS)
def test_reading_a_client_gives_back_its_tensors(kind: str) -> None:
    base = load_base(ModelConfig(name=str(shared_model(kind))))
    run = RunFolder(finished("fedalt", kind))
    assert client_ids(run) == [0, 1, 2]
    personal = read_client(run, 1, base)
    assert (personal.state.client, personal.state.round) == (1, 3)
    assert (personal.placement.slots, personal.placement.mixed) == (("individual", "rest_of_world"), True)
    assert (personal.placement.scale, personal.placement.dropout) == (4.0, 0.0)
    expected = {
        Key(module, slot, factor)
        for module in MODULES[kind]
        for slot, factor in ((INDIVIDUAL, A), (INDIVIDUAL, B), (REST_OF_WORLD, A), (REST_OF_WORLD, B), (MIXER, G))
    }
    assert set(personal.state.tensors) == expected
    on_disk = load_file(client_folder(kind) / "individual" / "adapter_model.safetensors")
    module = MODULES[kind][0]
    assert torch.equal(
        personal.state.tensors[Key(module, INDIVIDUAL, B)], on_disk[f"base_model.model.{module}.lora_B.weight"]
    )


def damaged(tmp_path: Path, name: str, data: bytes | None) -> Path:
    folder = tmp_path / "client"
    shutil.copytree(client_folder(), folder)
    if data is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(
    "name", ["individual/adapter_model.safetensors", "rest_of_world/adapter_model.safetensors", "mixer.safetensors"]
)
@pytest.mark.parametrize(("data", "says"), [(None, "missing"), (b"", "damaged"), (b"x" * 40, "damaged")])
def test_a_missing_or_damaged_file_is_named(tmp_path: Path, name: str, data: bytes | None, says: str) -> None:
    folder = damaged(tmp_path, name, data)
    with pytest.raises(UserError) as caught:
        read_folder(folder, ("individual", "rest_of_world"), mixed=True)
    assert str(caught.value).startswith(f"{folder / name}: {says}")


def test_a_foreign_tensor_is_named(tmp_path: Path) -> None:
    folder = damaged(tmp_path, "mixer.safetensors", b"")
    save_file(
        {"base_model.model.x.lora_magnitude": torch.ones(2)}, folder / "rest_of_world" / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match=r"unknown tensor base_model\.model\.x\.lora_magnitude"):
        read_folder(folder, ("individual", "rest_of_world"), mixed=False)


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    """PEFT keeps target modules in a set, whose order changes from process to process."""
    tensors = {Key(f"m{i}", INDIVIDUAL, f): torch.full((2, 2), float(i)) for i in range(20) for f in (A, B)}
    for name in ("one", "two"):
        write_lora(tmp_path / name, tensors, INDIVIDUAL, LoraFolder("base", 2, 2.5, 0.0, False))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    about = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert about["target_modules"] == sorted(f"m{i}" for i in range(20))
    assert about["lora_alpha"] == 2.5


# -------------------------------------------------------------------------------------------------------- static export


@cache
def exported(kind: str, method: str = "fedalt") -> tuple[Path, Any]:
    to = finished(method, kind).parent / f"static-{method}-{kind}"
    return to, export_static(finished(method, kind), 1, to)


def fixed_alpha_logits(kind: str, alpha: dict[str, float]) -> Tensor:
    """The literal formula with constant weights, on the client's own files."""
    folder, model = client_folder(kind), base_of(kind)
    loras = [load_file(folder / slot / "adapter_model.safetensors") for slot in ("individual", "rest_of_world")]

    def hook(module: Any, inputs: tuple[Tensor], y: Tensor, name: str) -> Tensor:
        key, x = f"base_model.model.{name}", inputs[0]
        own, row = (x @ t[f"{key}.lora_A.weight"].T @ t[f"{key}.lora_B.weight"].T for t in loras)
        return y + 4.0 * (alpha[name] * own + (1 - alpha[name]) * row)

    for name in MODULES[kind]:
        model.get_submodule(name).register_forward_hook(partial(hook, name=name))
    with torch.no_grad():
        return model(some_ids()).logits


@pytest.mark.parametrize("kind", KINDS)
def test_static_export_is_the_fixed_alpha_formula_and_merges(kind: str) -> None:
    to, cost = exported(kind)
    assert sorted(cost.alpha) == sorted(MODULES[kind])
    assert all(0 < value < 1 for value in cost.alpha.values())
    assert any(abs(value - 0.5) > 1e-3 for value in cost.alpha.values()), "the mixers have learnt something"
    expected = fixed_alpha_logits(kind, cost.alpha)
    model = AutoPeftModelForCausalLM.from_pretrained(to, dtype=torch.float32).eval()
    with torch.no_grad():
        assert relative(model(some_ids()).logits, expected) < 1e-5
        merged = model.merge_and_unload()
        assert relative(merged(some_ids()).logits, expected) < 1e-5
        assert (base_of(kind)(some_ids()).logits - expected).abs().max() > 1e-2
    assert not any("lora" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_static_export_is_one_ordinary_lora_of_twice_the_rank(kind: str) -> None:
    to, _ = exported(kind)
    written = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in to.iterdir()) == written
    about = json.loads((to / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["rank_pattern"], about["alpha_pattern"]) == (8, 32, {}, {})
    assert about["fan_in_fan_out"] is (kind == "gpt2")


def test_static_weights_are_the_means_over_the_training_rows() -> None:
    """Computed here from the client's files alone."""
    folder, alpha = client_folder(), exported("llama")[1].alpha
    model, source = personal_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    mixer = load_file(folder / "mixer.safetensors")
    rows = json.loads((shared_data() / "train" / "local_training_1.json").read_text())
    assert len({row_digest(Row(row["instruction"], row["output"])) for row in rows}) == len(rows) == 12
    total: dict[str, list[Tensor]] = {name: [] for name in MODULES["llama"]}

    def look(module: Any, inputs: tuple[Tensor], name: str) -> None:
        total[name].append((inputs[0] @ mixer[f"base_model.model.{name}.mixer.weight"].T).softmax(-1)[0, :, 0])

    for name in total:
        model.get_submodule(name).register_forward_pre_hook(partial(look, name=name))
    with torch.no_grad():
        for row in rows:
            prompt, answer = (
                tokenizer(text)["input_ids"] for text in (PROMPT.format(row["instruction"]), row["output"])
            )
            model(torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]]))
    for name, values in total.items():
        assert torch.cat(values).mean().item() == pytest.approx(alpha[name], abs=1e-5)


@pytest.mark.parametrize("method", ["local", "fedit"])
def test_static_export_of_one_lora_loses_nothing(method: str) -> None:
    to, cost = exported("llama", method)
    slot = {"local": "individual", "fedit": "global"}[method]
    assert cost.static == cost.personal
    own = load_file(client_folder(method=method) / slot / "adapter_model.safetensors")
    static = load_file(to / "adapter_model.safetensors")
    assert own.keys() == static.keys()
    assert all(torch.equal(value, static[name]) for name, value in own.items())


def test_static_scores_are_those_of_the_run() -> None:
    scores = json.loads((finished() / "results" / "final_scores.json").read_text())
    assert exported("llama")[1].personal == scores["last"]["clients"]["1"]["rouge1"]
