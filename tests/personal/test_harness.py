"""lm-evaluation-harness asks a client's model on a task of local rows; only where it is installed."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fedalt.personal.chat import Chat
from micro import call, finished, read_lines, refused

HERE = importlib.util.find_spec("lm_eval") is not None
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "### Instruction:\\n{{{{instruction}}}}\\n\\n### Response:\\n"
target_delimiter: ""
"""
CHOICE = """\
output_type: multiple_choice
doc_to_choice: ["yes", "no"]
doc_to_target: label
metric_list: [{metric: acc}]
"""
WRITTEN = """\
output_type: generate_until
doc_to_target: output
generation_kwargs: {until: ["</s>"], max_gen_toks: 5}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    rows = tmp_path / "rows.jsonl"
    asked = [f"Is {i} more than {3 * i % 10}? (0.{i})" for i in range(10)]
    lines = [{"instruction": text, "label": i % 2, "output": ("yes", "no")[i % 2]} for i, text in enumerate(asked)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = [tmp_path / "choice.yaml", tmp_path / "written.yaml"]
    for file, more in zip(files, (CHOICE, WRITTEN), strict=True):
        file.write_text(TASK.format(name=file.stem, rows=rows) + more)
    return ",".join(map(str, files))


def asked(run: Path, *options: Any) -> Any:
    done = call("evaluate", run, "--client", 1, "--json", "--lm-eval", *options)
    assert done.code == 0, done.err
    return done.json["clients"]["1"]


@pytest.mark.skipif(not HERE, reason="lm_eval is not installed")
def test_the_harness_asks_the_personal_model_with_its_mixer(tmp_path: Path, tasks: str) -> None:
    found = asked(finished("fedalt"), tasks)
    chat = Chat(finished("fedalt"), 1)
    rows = list(read_lines(tmp_path / "rows.jsonl"))
    right = [likelier(chat, row["instruction"]) == row["label"] for row in rows]
    assert found["choice"]["acc,none"] == sum(right) / len(right)
    same = [chat.ask(row["instruction"]).text == row["output"] for row in rows]
    assert found["written"]["exact_match,none"] == sum(same) / len(same)


@torch.no_grad()
def likelier(chat: Chat, text: str) -> int:
    """Which of yes and no the personal model finds likelier."""
    tokenizer, model = chat.resident.base.tokenizer, chat.resident.model
    chat.ask(text)
    prompt = chat.encoder.prompt(text)
    scores = []
    for choice in ("yes", "no"):
        ids = tokenizer(choice, add_special_tokens=False)["input_ids"]
        logits = model.base(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
        scores.append(sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(ids)))
    return scores.index(max(scores))


@pytest.mark.skipif(not HERE, reason="lm_eval is not installed")
def test_a_merged_model_scores_the_same_there(tmp_path: Path, tasks: str) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    run = finished("fedit")
    assert call("export", run, "--client", 1, "--to", tmp_path / "merged", "--merge").code == 0
    mine = asked(run, tasks)
    args = {"pretrained": str(tmp_path / "merged"), "device": "cpu", "dtype": "float32"}
    known = TaskManager(include_defaults=False)
    theirs = simple_evaluate("hf", model_args=args, tasks=tasks.split(","), task_manager=known)["results"]
    for task, metric in (("choice", "acc,none"), ("written", "exact_match,none")):
        assert math.isclose(mine[task][metric], theirs[task][metric])
        assert theirs[task]["sample_len"] == 10
    table = call("evaluate", run, "--client", 1, "--lm-eval", tasks).out
    assert "choice" in table and "acc (none)" in table


@pytest.mark.skipif(not HERE, reason="lm_eval is not installed")
def test_a_task_that_is_not_there_is_one_line(tasks: str) -> None:
    assert "nowhere" in refused("evaluate", finished("fedit"), "--client", 1, "--lm-eval", "nowhere")


@pytest.mark.skipif(HERE, reason="lm_eval is installed")
def test_without_the_harness_one_line_says_how_to_get_it() -> None:
    said = refused("evaluate", finished("fedit"), "--lm-eval", "arc_easy")
    assert "pip install 'fedalt[harness]'" in said


def test_tasks_have_rows_of_their_own() -> None:
    assert "leave --data and --central out" in refused("evaluate", finished("fedit"), "--lm-eval", "x", "--central")
