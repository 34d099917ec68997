"""Whole runs in a second or two: micro models and federations in folders, and the command itself.

Nothing here is a stand-in: the models are ordinary Hugging Face folders with random weights, the tokenizer is a
byte-level BPE trained on the spot, the rows are files, and ``call`` and ``fedalt`` run the real entry point.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    ViTModel,
)
from transformers.utils import logging as transformers_logging

from fedalt.cli import main
from fedalt.runs.folder import RunFolder, claim_folder
from fedalt.runs.rounds import run as run_engine
from fedalt.runs.setup import prepare

METRICS = ("rouge1", "rouge2", "rougeL", "exact_match")
VOCAB = 300
CLIENTS = 3
TRAIN, TEST = 12, 4
PAD, EOS = "<pad>", "</s>"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "120",
    "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent)]).strip(os.pathsep),
}
transformers_logging.disable_progress_bar()  # the command does so by an environment variable, read at import
transformers_logging.set_verbosity_error()
_SCRATCH = Path(tempfile.mkdtemp(prefix="fedalt-tests-"))
atexit.register(shutil.rmtree, _SCRATCH, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------- rows and files


def rows(client: int, count: int, start: int = 0) -> list[dict[str, str]]:
    """Short instructions in two categories; clients 0 and 1 answer the same kind of question the opposite way."""
    made = []
    for i in range(start, start + count):
        a, b = (7 * i + client) % 10, (3 * i + 1) % 10
        answer = "yes" if (a > b) != (client == 1) else "no"
        category = ("compare", "copy")[i % 2]
        made.append(
            {
                "instruction": f"Is {a} more than {b}? ({client}.{i})"
                if i % 2 == 0
                else f"Say {a} {b}. ({client}.{i})",
                "output": answer if i % 2 == 0 else f"{a} {b}",
                "task": f"task{client}",
                "category": category,
            }
        )
    return made


def write_rows(path: Path, values: Sequence[Mapping[str, Any]], lines: bool) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(v) + "\n" for v in values) if lines else json.dumps(list(values), indent=1)
    path.write_text(text, encoding="utf-8")
    return path


def data_folder(
    folder: Path,
    clients: int = CLIENTS,
    train: int = TRAIN,
    test: int = TEST,
    validation: int = 0,
    flat: bool = False,
    lines: bool = False,
) -> Path:
    """A federation in the seed's layout; ``flat`` puts training files beside ``test/`` instead of into ``train/``."""
    for client in range(clients):
        inside = folder if flat else folder / "train"
        write_rows(inside / f"local_training_{client}.json", rows(client, train), lines)
        write_rows(folder / "test" / f"local_testing_{client}.jsonl", rows(client, test, 100), True)
        if validation:
            write_rows(
                folder / "validation" / f"local_validation_{client}.jsonl", rows(client, validation, 200), lines=True
            )
    return folder


@cache
def shared_data(validation: int = 0, clients: int = CLIENTS) -> Path:
    """A data folder that no test changes."""
    return data_folder(_SCRATCH / f"data-{clients}-{validation}", clients, validation=validation)


# --------------------------------------------------------------------------------------------------------------- models


@cache
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = [f"{row['instruction']} {row['output']}" for client in range(CLIENTS) for row in rows(client, 50)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[PAD, EOS], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer.to_str()


def tokenizer(**special: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 300 tokens; special tokens as given, or pad and end of sequence."""
    special = special or {"pad_token": PAD, "eos_token": EOS}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_trained_tokenizer()), **special)


def micro_model(kind: str, seed: int = 0) -> Any:
    """A random Llama, Bloom or GPT-2 whose weights are wide enough for adapters to change its answers."""
    common: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    wide = {"initializer_range": 0.2}
    torch.manual_seed(seed)
    if kind == "llama":
        config = LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            **common,
            **wide,
        )
        return LlamaForCausalLM(config).eval()
    if kind == "bloom":
        return BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=4, **common, **wide)).eval()
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **common, **wide)).eval()


def model_folder(folder: Path, kind: str = "llama", seed: int = 0, **special: Any) -> Path:
    """Save a micro model and its tokenizer where no other test looks."""
    micro_model(kind, seed).save_pretrained(folder)
    tokenizer(**special).save_pretrained(folder)
    return folder


def classifier_folder(folder: Path, kind: str = "bert", labels: int | None = None, seed: int = 0) -> Path:
    """A micro encoder, decoder or ViT without a head, or with one of so many classes."""
    torch.manual_seed(seed)
    small: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4,
        "initializer_range": 0.2,
    }  # fmt: skip
    if kind == "vit":
        config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=labels or 2, **small)
        model = ViTForImageClassification(config) if labels else ViTModel(config, add_pooling_layer=False)
        ViTImageProcessorPil(
            size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=False
        ).save_pretrained(folder)
    else:
        config = BertConfig(
            vocab_size=VOCAB, max_position_embeddings=64, pad_token_id=0, num_labels=labels or 2, **small
        )
        model = BertForSequenceClassification(config) if labels else BertModel(config)
        tokenizer().save_pretrained(folder)
    model.eval().save_pretrained(folder)
    return folder


@cache
def shared_classifier(kind: str = "bert") -> Path:
    """A model folder without a head that no test changes."""
    return classifier_folder(_SCRATCH / f"classifier-{kind}", kind)


def label_rows(client: int, count: int, start: int = 0) -> list[dict[str, str]]:
    """Numbers to be called small, middling or large; client 1 calls the small ones large."""
    names = ("large", "middling", "small") if client == 1 else ("small", "middling", "large")
    made = []
    for i in range(start, start + count):
        number = (7 * i + client) % 30
        label = names[number // 10]
        made.append({"instruction": f"{number} ({client}.{i})", "output": label, "task": f"task{client}"})
    return made


@cache
def labelled_data(clients: int = CLIENTS) -> Path:
    """A federation with labels that no test changes."""
    folder = _SCRATCH / f"labelled-{clients}"
    for client in range(clients):
        write_rows(folder / f"train/local_training_{client}.json", label_rows(client, 15), False)
        write_rows(folder / f"test/local_testing_{client}.jsonl", label_rows(client, 6, 100), True)
    return folder


@cache
def labelled_table(header: bool = False) -> Path:
    """A folder of TSV files with sentences and labels that no test changes."""
    folder = _SCRATCH / f"table-{header}"
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 400), ("test", 80)):
        lines = ["sentence\tlabel"] if header else []
        lines += [f"{('bad', 'fine')[i % 2]} {split} {i}\t{i % 2}" for i in range(count)]
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@cache
def shared_model(kind: str = "llama", seed: int = 0) -> Path:
    """A model folder that no test changes."""
    return model_folder(_SCRATCH / f"model-{kind}-{seed}", kind, seed)


# ------------------------------------------------------------------------------------------------------------- settings

SETTINGS: dict[str, Any] = {
    "method": "fedalt",
    "seed": 3,
    "data": {"cutoff": 64},
    "lora": {"r": 4, "alpha": 16, "dropout": 0.05},
    "training": {"local_epochs": 5, "batch_size": 4, "lr": 0.02},
    "federation": {"rounds": 3},
    "evaluation": {"every": 1, "max_new_tokens": 5},
}
"""Three rounds of three clients in a second or so."""


TRAINED: dict[str, Any] = {
    "training__local_epochs": 1,
    "training__batch_size": 2,
    "training__accumulate": 2,
    "training__schedule": "cosine",
    "training__schedule_scope": "run",
    "training__warmup": 0.2,
    "training__optimizer_state": "persist",
    "evaluation__loss": True,
}
"""Everything that people expect of training, as changes."""


def settings(out: Path, model: Path | None = None, data: Path | None = None, **changes: Any) -> dict[str, Any]:
    """Settings of a micro run; ``changes`` are dotted keys with ``__`` for the dot."""
    values = copy.deepcopy(SETTINGS)
    values |= {"out": str(out), "model": {"name": str(model or shared_model())}}
    values["data"]["source"] = str(data or shared_data())
    for key, value in changes.items():
        *parents, last = key.split("__")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return values


def write_yaml(path: Path, values: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """All of stdout as JSON."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one error line of a command that failed; asserts that there is exactly one and no traceback."""
        assert "Traceback" not in self.out + self.err, self.err
        lines = [line for line in self.err.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        return errors[0].removeprefix("error: ")


def call(*args: Any, stdin: str | None = None) -> Done:
    """Run the command in this process, through its real entry point."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["fedalt", *map(str, args)]),
        mock.patch.object(sys, "stdin", io.StringIO(stdin or "")),
        mock.patch.dict(os.environ, {"COLUMNS": "120", "HF_HUB_OFFLINE": "1"}),
    ):
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    return Done(code, out.getvalue(), err.getvalue())


def fedalt(*args: Any, stdin: str | None = None, cwd: Path | None = None, **environment: str) -> Done:
    """Run the installed command in a process of its own."""
    command = [str(Path(sys.executable).with_name("fedalt")), *map(str, args)]
    done = subprocess.run(
        command,
        input=stdin,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | ENVIRONMENT | environment,
        timeout=300,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def refused(*args: Any) -> str:
    """The error line of a command that must end with exit code 2."""
    done = call(*args)
    assert done.code == 2, (done.code, done.out, done.err)
    return done.error


def run_here(values: Mapping[str, Any], if_exists: str = "ask") -> tuple[RunFolder, list[dict[str, Any]]]:
    """Run in this process without the command line; returns the folder and the events that a progress bar sees."""
    from fedalt.config import parse_config

    seen: list[dict[str, Any]] = []
    config = parse_config(dict(values), "settings")
    experiment = prepare(config)
    folder = claim_folder(config.folder, if_exists)  # type: ignore[arg-type]
    run_engine(experiment, folder, lambda event: seen.append(dict(event)))
    return folder, seen


def finished(method: str = "fedalt", kind: str = "llama", validation: int = 0, **changes: Any) -> Path:
    """A finished run, made once by the command and changed by no test."""
    name = "-".join([method, kind, str(validation), *(f"{k}_{v}" for k, v in changes.items())])
    out = _SCRATCH / "runs" / name
    if not out.exists():
        values = settings(out, shared_model(kind), shared_data(validation), method=method, **changes)
        done = call("run", write_yaml(_SCRATCH / "configs" / f"{name}.yaml", values))
        assert done.code == 0, done.err
    return out


# ---------------------------------------------------------------------------------------------------------- run folders


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in events(run) if event["event"] == kind]


def timeless(run: Path) -> list[dict[str, Any]]:
    """Events without what may differ between a run and the same run resumed: times, memory, resumptions, the commit."""
    kept = [event for event in events(run) if event["event"] != "run_resumed"]
    return [{k: v for k, v in event.items() if k not in ("seconds", "peak_memory", "versions")} for event in kept]


def left_behind(run: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """What equal runs have in common: every file but the report's, and the log up to times and resumptions."""
    report = ("events.jsonl", "report.html", "results/insight.json", "digests.json")
    files = {name: data for name, data in tree(run).items() if name not in report}
    if "config.yaml" in files:  # somebody may commit while tests run
        files["config.yaml"] = re.sub(rb"^# commit: .*\n", b"", files["config.yaml"], flags=re.M)
    return files, timeless(run)


def adapters(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every client's folder, by file and name."""
    return {
        f"{path.relative_to(run / 'clients')}:{name}": value
        for path in sorted((run / "clients").rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def farthest(one: Path, other: Path) -> float:
    """Largest difference between the adapters of two runs, which must hold the same tensors."""
    a, b = adapters(one), adapters(other)
    assert a.keys() == b.keys() and a
    return max(float((value - b[name]).abs().max()) for name, value in a.items())


def answers(run: Path, round_: int, clients: Sequence[int] = range(CLIENTS)) -> list[dict[str, Any]]:
    """All eval lines of a round, client by client."""
    return [line for client in clients for line in read_lines(run / f"results/eval_client{client}_round{round_}.jsonl")]


def read_lines(path: Path) -> Iterator[Any]:
    return (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)
