"""What a report shows beyond the log, from a finished run's saved clients."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fedalt.config import load_config
from fedalt.data.encode import token_texts
from fedalt.personal.chat import Chat
from fedalt.personal.insight import BINS, read_insight, write_insight
from fedalt.runs.folder import RunFolder
from micro import CLIENTS, TEST, TRAIN, answers, call, finished, read_lines, refused, settings, tokenizer, write_yaml

ALL = list(range(CLIENTS))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(finished(), tmp_path / "run")
    return tmp_path / "run"


def insight_of(path: Path) -> dict[str, Any]:
    found = json.loads((path / "results" / "insight.json").read_text())
    assert isinstance(found, dict)
    return found


def test_a_run_leaves_what_needs_no_model() -> None:
    insight = insight_of(finished())
    assert (insight["rows"], insight["round"], insight["clients"]) == (0, 3, ["0", "1", "2"])
    assert "matrix" not in insight
    assert "alpha" not in insight
    assert insight["similarity"]["slot"] == "individual"
    for client in ALL:
        splits = insight["partition"][str(client)]
        assert splits == {
            "train": {"compare": TRAIN // 2, "copy": TRAIN // 2},
            "test": {"compare": TEST // 2, "copy": TEST // 2},
        }


def test_the_matrix_holds_every_models_scores_on_every_clients_rows(run: Path, tmp_path: Path) -> None:
    """Its diagonal are the run's own scores, the rest those of ``evaluate`` with rows handed around."""
    assert call("report", run, "--insight", TEST).code == 0
    matrix = insight_of(run)["matrix"]
    final = json.loads((run / "results" / "final_scores.json").read_text())["last"]["clients"]
    assert [matrix[k][k] for k in ALL] == [final[str(k)]["rouge1"] for k in ALL]
    data = Path(load_config(run / "config.yaml").data.source)
    shutil.copytree(data, tmp_path / "data")
    for client in ALL:  # client k is asked client (k + 1)'s rows
        name = f"test/local_testing_{(client + 1) % CLIENTS}.jsonl"
        shutil.copy(data / name, tmp_path / "data" / f"test/local_testing_{client}.jsonl")
    scores = call("evaluate", run, "--data", tmp_path / "data", "--json").json["clients"]
    assert [matrix[k][(k + 1) % CLIENTS] for k in ALL] == [scores[str(k)]["rouge1"] for k in ALL]


@pytest.mark.parametrize("changes", [{"federation": {"cohort": 2}}, {"federation": {"executor": "loop"}}])
def test_cohorts_do_not_matter(run: Path, changes: dict[str, Any]) -> None:
    folder, config = RunFolder(run), load_config(run / "config.yaml")
    write_insight(folder, config, ALL, 3)
    whole = insight_of(run)
    (run / "results" / "insight.json").unlink()
    federation = config.federation.model_copy(update=changes["federation"])
    write_insight(folder, config.model_copy(update={"federation": federation}), ALL, 3)
    parts = insight_of(run)
    assert parts["matrix"] == whole["matrix"]
    for client in map(str, ALL):
        one, other = (torch.tensor(i["alpha"]["clients"][client]["histogram"]) for i in (whole, parts))
        assert (one - other).abs().sum() <= 2, "a weight on the edge of two bins may change sides"


def test_the_mixer_at_work(run: Path) -> None:
    """Weights are those that ``generate --show-alpha`` shows for the same row and answer."""
    assert call("report", run, "--insight", TEST).code == 0
    alpha = insight_of(run)["alpha"]
    assert alpha["slot"] == "individual"
    lines = answers(run, 3)
    for client in ALL:
        seen = alpha["clients"][str(client)]
        assert len(seen["histogram"]) == BINS
        assert len(seen["rows"]) == 3
        chat = Chat(run, client)
        mine = [line for line in lines if line["client_id"] == client]
        for row, line in zip(seen["rows"], mine, strict=False):
            text = "".join(token for token, _ in row["tokens"])
            prompt = "".join(token for token, _ in row["tokens"][: row["prompt"]])
            assert line["text"] in prompt
            assert text.removeprefix(prompt).strip() == line["answer"]
            shown = chat.ask(line["text"]).alpha
            assert [a for _, a in row["tokens"]] == pytest.approx([a for _, a in shown], abs=6e-4)
        assert sum(seen["histogram"]) > 4 * sum(len(row["tokens"]) for row in seen["rows"]), "four layers, a row more"


def test_a_method_without_a_mixer_has_no_alpha(tmp_path: Path) -> None:
    shutil.copytree(finished("local"), tmp_path / "run")
    assert call("report", tmp_path / "run", "--insight", "1").code == 0
    insight = insight_of(tmp_path / "run")
    assert insight["alpha"] is None
    assert len(insight["matrix"]) == CLIENTS


def test_fewer_rows_are_spread_over_the_file(run: Path) -> None:
    assert call("report", run, "--insight", "2").code == 0
    texts = [line["text"] for line in read_lines(run / "results/eval_client0_round3.jsonl")]
    rows = insight_of(run)["alpha"]["clients"]["0"]["rows"]
    assert len(rows) == 2
    for row, text in zip(rows, (texts[0], texts[TEST // 2]), strict=True):
        assert text in "".join(token for token, _ in row["tokens"])


def test_a_run_looks_by_itself_when_told(tmp_path: Path) -> None:
    values = settings(tmp_path / "run", federation__rounds=1, training__local_epochs=1, report__insight=2)
    assert call("run", write_yaml(tmp_path / "x.yaml", values)).code == 0
    assert insight_of(tmp_path / "run")["rows"] == 2
    assert "Every model on every client" in (tmp_path / "run" / "report.html").read_text()


def test_ten_rows_when_no_number_is_given(run: Path) -> None:
    assert call("report", run, "--insight").code == 0
    assert insight_of(run)["rows"] == 10
    assert call("report", "--insight", run).code == 0


def test_what_is_known_is_not_found_out_again(run: Path) -> None:
    """Fewer rows than before, or a drawing alone, leave the file as it is; more rows do not."""
    assert call("report", run, "--insight", "2").code == 0
    before = (run / "results" / "insight.json").read_bytes()
    assert call("report", run).code == 0
    assert call("report", run, "--insight", "1").code == 0
    assert call("run", "--out", run, "--resume").code == 0
    assert (run / "results" / "insight.json").read_bytes() == before
    assert call("report", run, "--insight", "3").code == 0
    assert insight_of(run)["rows"] == 3


def test_a_prolonged_run_forgets(run: Path) -> None:
    assert call("report", run, "--insight", "2").code == 0
    assert call("run", "--out", run, "--resume", "--rounds", "4").code == 0
    insight = insight_of(run)
    assert (insight["round"], insight["rows"]) == (4, 0)


def test_insight_of_another_round_is_not_shown(run: Path) -> None:
    path = run / "results" / "insight.json"
    path.write_text(json.dumps(insight_of(run) | {"round": 2}))
    assert read_insight(RunFolder(run)) is None


def test_a_run_that_has_not_finished_is_refused(run: Path) -> None:
    (run / "results" / "final_scores.json").unlink()
    assert "has not finished" in refused("report", run, "--insight")


def test_rows_that_are_gone_are_named(run: Path) -> None:
    config = (run / "config.yaml").read_text()
    source = load_config(run / "config.yaml").data.source
    (run / "config.yaml").write_text(config.replace(source, f"{source}-gone"))
    (run / "digests.json").unlink()
    assert f"{source}-gone" in refused("report", run, "--insight")


def test_report_settings_do_not_make_another_run(run: Path) -> None:
    done = call("run", "--out", run, "--resume", "--set", "report.insight=1")
    assert done.code == 0, done.err
    assert insight_of(run)["rows"] == 1


def test_pieces_add_up_to_the_text() -> None:
    """Also where a character takes several tokens; every token has a piece, maybe an empty one."""
    mine = tokenizer()
    text = "Say 7 1. Größe 🙂, 日本"
    ids = mine(text)["input_ids"]
    parts = token_texts(mine, ids)
    assert len(parts) == len(ids)
    assert "".join(parts) == mine.decode(ids)
    assert "🙂" in parts
    cut = token_texts(mine, ids[:-1])
    assert "".join(cut) == mine.decode(ids[:-1])
