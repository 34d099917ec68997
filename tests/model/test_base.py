"""Loading a frozen base from a folder: three architectures, every kind of wrong folder, no pickle, fingerprints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from fedalt.config import ModelConfig
from fedalt.errors import UserError
from fedalt.model.adapted import AdaptedModel
from fedalt.model.base import fingerprint, load_base, resolve_device
from micro import (
    EOS,
    PAD,
    call,
    events,
    micro_model,
    model_folder,
    refused,
    run_here,
    settings,
    shared_model,
    write_yaml,
)
from micro import tokenizer as micro_tokenizer

TARGETS = {
    "llama": {f"model.layers.{i}.self_attn.{n}": (32, o) for i in (0, 1) for n, o in (("q_proj", 32), ("v_proj", 16))},
    "bloom": {f"transformer.h.{i}.self_attention.query_key_value": (32, 96) for i in (0, 1)},
    "gpt2": {f"transformer.h.{i}.attn.c_attn": (32, 96) for i in (0, 1)},
}


def load(folder: Path, **options: Any) -> Any:
    return load_base(ModelConfig(name=str(folder), **options))


def complaint(folder: Path | str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_base(ModelConfig(name=str(folder), **options))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------- what loads


@pytest.mark.parametrize("kind", TARGETS)
def test_three_architectures(kind: str) -> None:
    base = load(shared_model(kind))
    adapted = AdaptedModel(base.model)
    assert adapted.layer_sizes == TARGETS[kind]
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training
    assert {p.dtype for p in base.model.parameters()} == {torch.float32}
    assert base.source == str(shared_model(kind))
    assert (base.tokenizer.pad_token, base.tokenizer.eos_token) == (PAD, EOS)


@pytest.mark.parametrize("kind", TARGETS)
def test_what_is_loaded_is_what_was_saved(kind: str) -> None:
    loaded, made = load(shared_model(kind)).model.state_dict(), micro_model(kind).state_dict()
    assert loaded.keys() == made.keys()
    assert all(torch.equal(value, made[name]) for name, value in loaded.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_base_takes_the_dtype_asked_for_and_the_adapters_stay_fp32(tmp_path: Path, dtype: str) -> None:
    assert {p.dtype for p in load(shared_model(), dtype=dtype).model.parameters()} == {getattr(torch, dtype)}
    run, _ = run_here(settings(tmp_path / "run", model__dtype=dtype, federation__rounds=2))
    files = sorted((run.path / "clients").rglob("*.safetensors"))
    assert files
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {torch.float32}
    losses = [event["loss"] for event in events(run.path) if event["event"] == "round"]
    assert losses[1] < losses[0]


def test_a_relative_folder_is_remembered_by_its_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_folder(tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path / "here")
    assert load(Path("model")).source == str((tmp_path / "here" / "model").resolve())
    assert load(Path("./model")).source == str((tmp_path / "here" / "model").resolve())


def test_tiny_base_ships() -> None:
    base = load_base(ModelConfig())
    assert Path(base.source).is_dir()
    assert (Path(base.source) / "model.safetensors").is_file()
    assert base.tokenizer.pad_token_id is not None


def test_a_tokenizer_without_pad_pads_with_its_end(tmp_path: Path) -> None:
    base = load(model_folder(tmp_path, eos_token=EOS))
    assert base.tokenizer.pad_token_id == base.tokenizer.eos_token_id == 1


def test_a_run_on_a_tokenizer_without_pad(tmp_path: Path) -> None:
    """Padding with the end token may not hide or add supervised ends: the loss is that of any other padding."""
    with_pad = settings(tmp_path / "a", model_folder(tmp_path / "m1"), federation__rounds=2)
    without = settings(tmp_path / "b", model_folder(tmp_path / "m2", eos_token=EOS), federation__rounds=2)
    losses = [[e["loss"] for e in events(run_here(v)[0].path) if e["event"] == "round"] for v in (with_pad, without)]
    assert losses[0] == losses[1]


# -------------------------------------------------------------------------------------------------------- what does not


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def config_of(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def rename_tensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(
        {name.replace("model.", "net."): value for name, value in load_file(path).items()}, path, {"format": "pt"}
    )


def widen_a_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "model.norm.weight": torch.ones(33)}, path, {"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(micro_model("llama").state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (without("config.json"), "no config.json"),
    "config is no JSON": (write("config.json", b"{"), "cannot be loaded|can be loaded"),
    "config is a list": (write("config.json", b"[]"), "can be loaded"),
    "unknown architecture": (config_of(model_type="nonesuch"), "can be loaded"),
    "no weights": (without("model.safetensors"), "can be loaded"),
    "weights cut short": (cut, "can be loaded"),
    "weights of nothing": (write("model.safetensors", b""), "can be loaded"),
    "weights under other names": (rename_tensors, "can be loaded"),
    "weights of another shape": (widen_a_tensor, "can be loaded"),
    "pickle only": (pickled, "can be loaded"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    "tokenizer is no JSON": (write("tokenizer.json", b"{"), "tokenizer"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_is_no_model_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = model_folder(tmp_path / "model")
    change, piece = BAD[name]
    change(folder)
    line = refused("run", write_yaml(tmp_path / "x.yaml", settings(tmp_path / "run", folder)))
    assert line.startswith("model.name: ")
    assert str(folder) in line
    assert any(part in line for part in piece.split("|"))
    assert not (tmp_path / "run").exists()


def test_pickle_is_never_opened(tmp_path: Path) -> None:
    """Unpickling this file would leave a trace."""

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    folder = model_folder(tmp_path / "model")
    torch.save({"x": Bomb()}, folder / "pytorch_model.bin")
    load(folder)  # safetensors beside it: loads, and the pickle stays closed
    (folder / "model.safetensors").unlink()
    complaint(folder)
    assert not (tmp_path / "exploded").exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "exploded").exists(), "the trap itself works"


def test_an_encoder_decoder_is_no_causal_lm(tmp_path: Path) -> None:
    config = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    micro_tokenizer().save_pretrained(tmp_path)
    assert "not a causal LM" in complaint(tmp_path)


def test_an_encoder_is_no_causal_lm(tmp_path: Path) -> None:
    """Transformers would make a decoder of it with a random head, and say so only in a warning."""
    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(tmp_path)
    micro_tokenizer().save_pretrained(tmp_path)
    assert "causal LM" in complaint(tmp_path)


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "~/nowhere/at/all", "a/b/c"])
def test_a_path_that_does_not_exist(name: str) -> None:
    assert complaint(name).startswith(
        f"model.name: {name} is no model; give a folder, a GGUF file, a hub name, tiny-base"
    )


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    assert f"{path} is a file of weights (safetensors), no model" in complaint(path)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    line = complaint(model_folder(tmp_path, pad_token=PAD))
    assert "no end-of-sequence token" in line
    assert str(tmp_path) in line


def test_a_target_that_matches_nothing_lists_the_candidates(tmp_path: Path) -> None:
    for kind, wrong, right in (("llama", "q_pro", "q_proj"), ("gpt2", "c_atn", "c_attn"), ("bloom", "qkv", None)):
        config = write_yaml(
            tmp_path / f"{kind}.yaml", settings(tmp_path / "run", shared_model(kind), lora__targets=[wrong])
        )
        line = refused("run", config)
        assert line.startswith(f'lora.targets: "{wrong}" matches no linear layer')
        assert "linear layers here: " in line
        assert right is None or f'did you mean "{right}"?' in line
        assert next(iter(TARGETS[kind])).rsplit(".", 1)[1] in line
        assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------- fingerprints


@pytest.mark.parametrize("kind", TARGETS)
def test_the_fingerprint_is_stable(kind: str) -> None:
    assert load(shared_model(kind)).sha256 == load(shared_model(kind)).sha256 == fingerprint(micro_model(kind))


def test_the_fingerprint_sees_one_weight() -> None:
    model = micro_model("llama")
    seen = {fingerprint(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            kept = parameter.view(-1)[-1].clone()
            parameter.view(-1)[-1] = kept + 1e-3
        seen.add(fingerprint(model))
        with torch.no_grad():
            parameter.view(-1)[-1] = kept
    assert len(seen) == 1 + len(list(model.parameters()))
    assert fingerprint(model) in seen


def test_the_fingerprint_sees_dtype_and_shape() -> None:
    model = micro_model("gpt2")
    whole, half = fingerprint(model), fingerprint(model.bfloat16())
    assert whole != half


def test_saved_adapters_refuse_another_base(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    run, _ = run_here(settings(tmp_path / "run", folder, federation__rounds=1))
    assert call("evaluate", run.path).code == 0
    shutil.rmtree(folder)
    model_folder(folder, seed=1)
    line = refused("evaluate", run.path)
    assert "made for another base model" in line
    assert str(run.client(0)) in line


# ------------------------------------------------------------------------------------------------ devices, quantisation


def test_a_gpu_beyond_the_last_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [resolve_device(name) for name in ("cuda", "cuda:0", "cuda:1", "auto", "cpu")] == [
        "cuda", "cuda:0", "cuda:1", "cuda", "cpu",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"^federation.devices: there is no cuda:7 .*, the last GPU is cuda:1$"):
        resolve_device("cuda:7", "federation.devices")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there(tmp_path: Path, device: str) -> None:
    config = write_yaml(tmp_path / "x.yaml", settings(tmp_path / "run", model__device=device))
    line = refused("run", config)
    assert line == f"model.device: {device} is not available on this machine; use cpu or auto"


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_quantised_base_trains_on_the_cpu(tmp_path: Path, bits: str, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    values = settings(tmp_path / "run", shared_model(kind), model__load_in=bits, model__device="cpu")
    run, _ = run_here(values)
    losses = [event["loss"] for event in events(run.path) if event["event"] == "round"]
    assert losses[-1] < losses[0]
    moved = load_file(run.client(0) / "individual" / "adapter_model.safetensors")
    assert all(value.abs().max() > 0 for name, value in moved.items() if "lora_B" in name), "every B has left zero"
    own = json.loads(run.final_scores.read_text())["last"]["clients"]
    again = call("evaluate", run.path, "--json").json["clients"]
    assert all(again[c][metric] == value for c in own for metric, value in own[c].items())


def test_a_quantised_base_really_is_quantised() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    linear = {"8bit": bitsandbytes.nn.Linear8bitLt, "4bit": bitsandbytes.nn.Linear4bit}
    plain = load(shared_model()).sha256
    for bits, expected in linear.items():
        base = load(shared_model(), load_in=bits, device="cpu")
        assert isinstance(base.model.model.layers[0].self_attn.q_proj, expected)
        assert base.sha256 != plain
        assert AdaptedModel(base.model).layer_sizes == TARGETS["llama"]


def test_quantisation_without_bitsandbytes_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'fedalt[quantized]'" in complaint(shared_model(), load_in="8bit")


def test_a_folder_that_is_quantised_already_is_opened_as_it_says(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = load(shared_model(), load_in="4bit", device="cpu")
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path, load_in="4bit", device="cpu").sha256 == base.sha256
    for given in ({}, {"load_in": "8bit"}):
        line = complaint(tmp_path, device="cpu", **given)
        assert line == f"model.load_in: {tmp_path} is quantised to 4bit already; write model.load_in=4bit"
