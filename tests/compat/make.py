"""Makes the old files that ``test_old_files.py`` opens: runs, exports, newcomers, and every setting by its old name.

Run with the code of commit ad2512f, from before settings, slots and modules got the names that they have now:

    git worktree add ../old ad2512f
    OMP_NUM_THREADS=1 PYTHONPATH=../old/src:../old/tests python tests/compat/make.py

It writes ``old.tar.xz`` and the YAML and JSON files beside this script. Nobody needs to run it again: files made by
newer code are no old files. Reports are left out, since they can be drawn again and hold a plotting library each.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from peft import PeftModel
from pydantic import BaseModel
from safetensors.torch import save_file
from test_old_files import CLIENT, flat, machine
from test_old_files import RUNS as FINISHED
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fedalt.config import RunConfig, load_config, parse_config
from fedalt.runs.folder import claim_folder
from fedalt.runs.rounds import run as run_engine
from fedalt.runs.setup import prepare
from micro import VOCAB, call, label_rows, rows, tokenizer, write_rows, write_yaml

HERE = Path(__file__).parent
CLIENTS, TRAIN, TEST = 3, 8, 3
QUESTION = "Say 1 2."

COMMON: dict[str, Any] = {
    "method": "fedalt",
    "seed": 3,
    "model": {"name": "base", "device": "cpu"},
    "data": {"source": "rows", "cutoff": 64},
    "lora": {"r": 2, "alpha": 8, "targets": ["o_proj", "down_proj"]},
    "training": {"local_epochs": 12, "batch_size": 4, "lr": 0.08},
    "federation": {"rounds": 2},
    "evaluation": {"every": 1, "max_new_tokens": 2},
}
"""Paths are relative, so that the files can be opened in any folder."""

RUNS: dict[str, dict[str, Any]] = {
    "fedalt": {},
    "stopped": {"federation": {"rounds": 3}, "fedalt": {"row_aggregator": "svd", "row_rank": 1}},
    "average_rows": {"fedalt": {"row_update": "average_rows"}},
    "clusters": {"method": "fedalt_clusters", "fedalt": {"clusters": 2}},
    "stack": {"method": "fedalt_stack", "fedalt": {"row_aggregator": "stack"}},
    "fraction": {
        "data": {"validation_rows": 2},
        "federation": {
            "fraction": 0.67, "row_participation": "staleness_decay", "staleness_decay": 0.5, "row_delivery": "unicast",
        },
    },
    "heads": {"model": {"task": "sequence_classification"}, "data": {"source": "labelled"}},
    "feddpa_t": {"method": "feddpa_t"},
    "fdlora": {"method": "fdlora", "fdlora": {"budget": 9, "few_shot": 4, "sync_every": 1}},
}  # fmt: skip
"""Run → what differs from the common settings."""

TABLE = {"federation": {"rounds": 1}, "fedalt": {"row_aggregator": "fair"}}
"""What differs in the comparison and in the sweep."""

EVERY_KEY: dict[str, Any] = {
    "method": "fdlora",
    "seed": 7,
    "out": "runs/old",
    "model": {
        "name": "some/model", "task": "sequence_classification", "labels": ["bad", "good"], "pooling": "mean",
        "dtype": "bfloat16", "device": "cuda:1", "load_in": "4bit", "gradient_checkpointing": True,
    },
    "data": {
        "source": "rows.csv", "config": "sst2", "text_columns": ["title", "body"], "label_column": "stars",
        "columns": ["title", "body", "stars"], "label_names": {0: "bad", 1: "good"}, "tasks": ["films", "books"],
        "clients": 5, "held_out": 1,
        "partition": {
            "by": "sc_dir", "alpha": 0.3, "classes_per_client": 3, "column": "category", "superclasses_per_client": 2,
            "dir_level": "superclass", "min_rows": 4, "test": "shared", "seed": 9, "file": "partition.json",
        },
        "test_share": 0.3, "split_rows": True, "tasks_per_client": 2, "template": "chat", "cutoff": 128,
        "validation_rows": 6, "shuffle": True, "train_limit": 100, "test_limit": 20,
        "tinyworld": {"seed": 1, "clash": 0.25},
    },
    "lora": {
        "r": 6, "ranks": [2, 4, 6], "alpha": 12, "dropout": 0.1, "targets": ["q_proj", "k_proj"], "init": "per_client",
        "mixer_init": "zeros",
    },
    "training": {
        "local_epochs": 2, "batch_size": 16, "lr": 1e-4, "schedule": "constant", "weight_decay": 0.01,
        "max_grad_norm": 0.5, "order": "bucketed", "repeat_order": True,
    },
    "federation": {
        "rounds": 11, "fraction": 0.5, "weighting": "samples", "row_participation": "participants",
        "staleness_decay": 0.8, "row_delivery": "unicast", "heads": "shared", "executor": "loop", "cohort": 2,
        "devices": ["cuda:0", "cuda:1"],
    },
    "evaluation": {
        "every": 2, "points": ["after"], "max_new_tokens": 40, "num_beams": 4, "batch_size": 8, "stemmer": False,
        "options": "mean", "metric": "macro_f1",
    },
    "report": {"insight": 3, "trackers": ["tensorboard", "wandb"]},
    "fedalt": {
        "row_aggregator": "svd", "row_rank": 3, "ridge": 0.1, "trim": 0.3, "byzantine": 2, "clusters": 2,
        "row_from": "all", "row_update": "discard", "halved": True, "mixing": "half", "full_start": True,
        "mixer_average": True,
    },
    "fedit_split": {"parts": 3, "router": "mean", "router_average": False, "scaling": "part"},
    "feddpa": {"local_weight": 0.4, "samples": 3, "most": 0.6, "weight_target": "global", "embed_with": "base"},
    "pf2lora": {"private_rank": 2, "private_lr": 0.02, "hypergrad": "unrolled", "private_scale": "own_rank"},
    "fdlora": {
        "outer_lr": 0.5, "outer_momentum": 0.8, "sync_every": 2, "few_shot": 8, "budget": 20, "penalty": 0.1,
    },
    "hetlora": {"tail": 0.9, "decay": 0.01, "prune": False},
    "lora_fair": {"solver": "ridge", "weight": 0.1, "lr": 0.02, "steps": 50},
    "flower": {
        "wire": "int8", "min_sites": 3, "round_deadline": 60, "norm_limit": 10, "allow_two": True, "client_gpus": 0.5,
    },
}  # fmt: skip
"""Every key with a value that is not its default."""

METHOD_SECTIONS: dict[str, Any] = {
    "fedalt": {"row_aggregator": "krum", "row_rank": 1, "byzantine": 0, "row_update": "average_rows"},
    "fedit_split": {"parts": 4, "router": "none"},
    "feddpa": {"embed_with": "global", "most": 1},
    "pf2lora": {"private_rank": 1},
    "fdlora": {"penalty": 0},
    "hetlora": {"decay": 0},
    "lora_fair": {"steps": 1},
}
"""All sections of methods, with some keys each."""

CONTEXT: dict[str, dict[str, Any]] = {
    "accuracy": {"model.task": "sequence_classification"},
    "macro_f1": {"model.task": "sequence_classification"},
    "option_accuracy": {"evaluation.options": "sum"},
    "before": {"evaluation.points": ["before", "after"]},
}
"""Value → what else must be set for it to be allowed."""


def main() -> None:
    """Make everything in a folder of its own and pack it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fedalt-old-") as folder:
        os.chdir(folder)
        make_inputs()
        make_runs()
        make_tables()
        make_taken_away()
        make_expected()
        pack(HERE / "old.tar.xz")
        os.chdir(HERE)
    make_settings()


def make_inputs() -> None:
    """A base of 9,000 weights, a federation with answers, one with labels, and two newcomers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, intermediate_size=32, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.4,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).eval().save_pretrained("base")
    tokenizer().save_pretrained("base")
    for client in range(CLIENTS):
        write_rows(Path(f"rows/train/local_training_{client}.json"), rows(client, TRAIN), False)
        write_rows(Path(f"rows/test/local_testing_{client}.jsonl"), rows(client, TEST, 100), True)
        write_rows(Path(f"labelled/train/local_training_{client}.json"), label_rows(client, 12), False)
        write_rows(Path(f"labelled/test/local_testing_{client}.jsonl"), label_rows(client, 6, 100), True)
    for new in range(2):
        write_rows(Path(f"strangers/train/local_training_{new}.json"), rows(CLIENTS + new, TRAIN), False)
        write_rows(Path(f"strangers/test/local_testing_{new}.jsonl"), rows(CLIENTS + new, TEST, 100), True)


def merged(*settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings on top of others, section by section."""
    values: dict[str, Any] = {}
    for one in settings:
        for key, value in one.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return values


def make_runs() -> None:
    """Every run by the command, from a YAML that is kept; one of them is killed in its second round."""
    for name, changes in RUNS.items():
        path = write_yaml(Path(f"{name}.yaml"), merged(COMMON, changes, {"out": name}))
        if name == "stopped":
            killed(path)
        else:
            do("run", path)


def killed(path: Path) -> None:
    """Start a run in a process of its own that kills itself in the middle of the second round."""
    process = get_context("spawn").Process(target=doomed, args=(path.absolute(),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.name for path in Path("stopped/checkpoints").glob("round_*")] == ["round_0001"]


def doomed(path: Path) -> None:
    """What that process does."""
    os.chdir(path.parent)
    config = load_config(path)
    experiment = prepare(config)
    run_engine(experiment, claim_folder(config.folder, "ask"), kill_in_the_second_round)


def kill_in_the_second_round(event: Mapping[str, Any]) -> None:
    """``kill -9`` at the first step of round 2."""
    if event["event"] == "step" and event["round"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def make_tables() -> None:
    """A comparison of two methods with two seeds, and a sweep over two ranks."""
    path = write_yaml(Path("table.yaml"), merged(COMMON, TABLE))
    do("compare", path, "--methods", "local,fedalt", "--seeds", "0,1", "--out", "comparison")
    do("compare", path, "--methods", "fedalt", "--sweep", "lora.r=1,2", "--out", "sweep")


def make_taken_away() -> None:
    """Exports of client 1 of ``fedalt``, and its newcomers."""
    do("export", "fedalt", "--client", 1, "--to", "export")
    do("export", "fedalt", "--client", 1, "--to", "static", "--static")
    do("onboard", "fedalt", "--data", "strangers", "--epochs", 2, "--out", "newcomers")


def make_expected() -> None:
    """How two runs go on, what PEFT makes of the exports, what the models say, and on which machine."""
    for name, arguments in {
        "fedalt": ("--out", "fedalt", "--resume", "--rounds", 3),
        "stopped": ("stopped.yaml", "--resume"),
    }.items():
        shutil.copytree(name, f"{name}.before")
        do("run", *arguments)
        new = Path("expected", name)
        new.mkdir(parents=True)
        Path(name, "clients").rename(new / "clients")
        shutil.copy(Path(name, "results/final_scores.json"), new)
        shutil.rmtree(name)
        Path(f"{name}.before").rename(name)
    said = {
        folder: do("generate", folder, "--client", CLIENT.get(folder, 1), QUESTION).out.rstrip("\n")
        for folder in (*FINISHED, "newcomers")
    }
    shaded = do("generate", "fedalt", "--client", 1, "--show-alpha", QUESTION).out
    about = {"machine": machine(), "question": QUESTION, "said": said, "shaded": shaded.splitlines()[-1]}
    Path("expected/about.json").write_text(json.dumps(about, indent=1))
    ids = torch.arange(2, 22)[None]
    folders = ("export/individual", "export/row", "static", "newcomers/clients/3/row")
    save_file({folder: logits(folder, ids) for folder in folders} | {"ids": ids}, "expected/logits.safetensors")


@torch.no_grad()
def logits(folder: str, ids: torch.Tensor) -> torch.Tensor:
    """The last token's, by plain PEFT."""
    base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder).eval()(ids).logits[0, -1].contiguous()


def make_settings() -> None:
    """Every key in a YAML and what it means; every value that one may choose."""
    config = parse_config(EVERY_KEY, "every key")
    default = dict(flat(RunConfig().model_dump(mode="json")))
    meant = dict(flat(config.model_dump(mode="json")))
    same = [key for key, value in meant.items() if key in default and default[key] == value]
    assert not same and default.keys() - {"data.label_names"} <= meant.keys(), same
    write_yaml(HERE / "every_key.yaml", EVERY_KEY)
    write_yaml(HERE / "method_sections.yaml", METHOD_SECTIONS)
    for name in ("every_key", "method_sections"):
        write_json(HERE / f"{name}.json", dict(flat(load_config(HERE / f"{name}.yaml").model_dump(mode="json"))))
    choices = []
    for key, several, value in literals(RunConfig):
        chosen = {key: [value] if several else value} | CONTEXT.get(value, {})
        load_config(None, list(chosen.items()))
        choices.append(chosen)
    lines = ",\n".join(json.dumps(one) for one in choices)
    (HERE / "choices.json").write_text(f"[\n{lines}\n]\n")


def literals(section: type[BaseModel], start: str = "") -> Iterator[tuple[str, bool, str]]:
    """Dotted key, whether it takes several, value: for everything that one chooses from a list."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from literals(field.annotation, f"{start}{name}.")
        else:
            yield from ((f"{start}{name}", several, v) for several, v in _values(field.annotation, False))


def _values(kind: Any, several: bool) -> Iterator[tuple[bool, str]]:
    if get_origin(kind) is Literal:
        yield from ((several, value) for value in get_args(kind))
        return
    for inner in get_args(kind):
        yield from _values(inner, several or get_origin(kind) is tuple)


def write_json(path: Path, value: Any) -> None:
    """With a line per entry."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def do(*arguments: Any) -> Any:
    """A command that must succeed."""
    done = call(*arguments)
    assert done.code == 0, done.err
    return done


def pack(archive: Path) -> None:
    """Everything below the working directory but reports, without what changes from packing to packing."""

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        return None if member.name.endswith("report.html") else member

    with tarfile.open(archive, "w:xz") as file:
        for path in sorted(Path().iterdir()):
            file.add(path, filter=plain)


if __name__ == "__main__":
    sys.exit(main())
