"""GGUF files that are written are read again, by Transformers' own reader, as the same model and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config
from transformers import Qwen2ForCausalLM as Qwen2
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from fedalt.errors import UserError
from fedalt.model.gguf_files import check_gguf, write_gguf
from fedalt.model.source import dequantized
from micro import VOCAB, call, finished, micro_model, refused, tokenizer
from support import relative

IDS = torch.randint(2, 300, (3, 12), generator=torch.Generator().manual_seed(0))
TEXT = "Is 3 more than 1? (0.4)\n\n\tYES 12345 naïve 中文</s>"
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "eos_token_id": 1,
    "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDALT_CACHE", str(tmp_path / "cache"))


def small(kind: str, tied: bool, **changes: Any) -> Any:
    config, made = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2)}[kind]
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB + 4, "tie_word_embeddings": tied, **SIZES, **changes}
    model = made(config(**sizes)).eval()
    for name, value in model.named_parameters():
        if value.dim() == 1:  # norms and biases start at 1 and 0, which hides errors
            torch.nn.init.normal_(value, float("norm" in name), 0.2)
    return model


def splitting(name: str) -> Any:
    """As Transformers has it for files that name it."""
    split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_what_is_written_is_read_again(tmp_path: Path, kind: str, tied: bool) -> None:
    model, words = small(kind, tied, rope_theta=5000.0), tokenizer()
    if kind == "qwen2":  # Transformers reads all tokenizers of this architecture as Qwen2's
        words.backend_tokenizer.pre_tokenizer = splitting("qwen2")
    words.chat_template = "{{ messages[0].content }}"
    for form, near in (("f16", 5e-3), ("q8_0", 0.1)):
        write_gguf(tmp_path / f"{form}.gguf", model, words, form)
        folder = dequantized(tmp_path / f"{form}.gguf")
        again = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert again.config.tie_word_embeddings is tied
        assert relative(logits(again), logits(model)) < near
        for name, value in again.state_dict().items():
            whole = model.state_dict()[name]
            step = whole.abs().max() * (2**-11 if form == "f16" else 2**-11 + 1 / 254)  # q8_0 has its scales in f16
            assert (value - whole).abs().max() <= step, name
        read = AutoTokenizer.from_pretrained(folder)
        assert read(TEXT)["input_ids"] == words(TEXT)["input_ids"]
        assert (read.eos_token_id, read.pad_token_id, read.chat_template) == (1, 0, words.chat_template)


@pytest.mark.parametrize(
    ("split", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            "smollm",
        ),
        ("qwen2", "qwen2"),
        ("llama-bpe", "llama-bpe"),
    ],
    ids=["gpt-2", "smollm", "qwen2", "llama-bpe"],
)
def test_ways_of_splitting_text_have_llama_cpps_names(tmp_path: Path, split: Any, name: str) -> None:
    words = tokenizer()
    words.backend_tokenizer.pre_tokenizer = splitting(split) if isinstance(split, str) else split
    write_gguf(tmp_path / "x.gguf", small("llama", True), words, "f16")
    assert GGUFReader(tmp_path / "x.gguf").fields["tokenizer.ggml.pre"].contents() == name


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (lambda: micro_model("gpt2"), "gpt2 is not written; only llama and qwen2 are"),
        (lambda: small("llama", True, attention_bias=True), "this llama has biases, which are not written"),
        (lambda: small("llama", True, head_dim=8), "this llama has heads whose widths"),
        (lambda: small("qwen2", True, use_sliding_window=True), "this qwen2 has a sliding window"),
        (lambda: small("llama", True, vocab_size=290), "tokens that the model has no embeddings for"),
        (
            lambda: small("llama", True, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            "this llama has rotary positions of kind linear",
        ),
    ],
)
def test_what_a_file_would_not_hold_is_refused(model: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        check_gguf(model(), tokenizer())


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    words = tokenizer()
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match=r"byte-level BPE as in GPT-2, Llama 3, Qwen2 or SmolLM"):
        check_gguf(small("llama", True), words)


def test_export_writes_the_file_and_the_same_model_beside_it(tmp_path: Path) -> None:
    to = tmp_path / "away"
    assert call("export", finished(), "--client", 1, "--to", to, "--gguf", "f16").code == 0
    assert sorted(path.name for path in to.iterdir()) == ["README.md", "model-f16.gguf"]
    both = tmp_path / "both"
    assert call("export", finished(), "--client", 1, "--to", both, "--merge", "--gguf", "f16").code == 0
    merged = AutoModelForCausalLM.from_pretrained(both).eval()
    read = AutoModelForCausalLM.from_pretrained(dequantized(to / "model-f16.gguf")).eval()
    assert relative(logits(read), logits(merged)) < 2e-3
    assert "gpt2 is not written" in refused(
        "export", finished("fedalt", "gpt2"), "--client", 1, "--to", tmp_path / "no", "--gguf", "f16"
    )
    assert not (tmp_path / "no").exists()


@torch.no_grad()
def test_llama_cpp_gives_the_same_greedy_answer(tmp_path: Path) -> None:
    """By llama.cpp itself, in the package that has it compiled."""
    cpp = pytest.importorskip("xllamacpp", reason="needs pip install xllamacpp")
    model, prompt = small("llama", True), tokenizer()(TEXT)["input_ids"][:12]
    write_gguf(tmp_path / "model.gguf", model, tokenizer(), "f16")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    wanted = model.half().float().generate(torch.tensor([prompt]), **options)[0, len(prompt) :]
    params = cpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(tmp_path / "model.gguf"), 128, 1, False
    asked = {"prompt": prompt, "n_predict": 8, "temperature": 0, "ignore_eos": True}
    params.cpuparams.n_threads = 1
    (said,) = cpp.Server(params).handle_completions(asked)["choices"]
    assert said["text"] == tokenizer().decode(wanted)
