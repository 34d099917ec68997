"""Option likelihoods beside generated answers, in a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from micro import answers, call, refused, rows, settings, shared_data, shared_model, write_rows, write_yaml


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Client 0's rows list options, client 1's do not."""
    folder = tmp_path_factory.mktemp("options")
    for client in range(2):
        for split, start, count in (("train/local_training", 0, 12), ("test/local_testing", 100, 6)):
            made = [row for row in rows(client, 2 * count, start) if row["category"] == "compare"]
            if client == 0:
                made = [row | {"instruction": row["instruction"] + "\nOPTIONS:\n- yes\n- no"} for row in made]
            write_rows(folder / f"{split}_{client}.json{'l' if 'test' in split else ''}", made, True)
    return folder


def test_options_are_scored_where_there_are_any(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    values = settings(out, shared_model(), data, evaluation__options="sum", federation__rounds=1)
    done = call("run", write_yaml(tmp_path / "c.yaml", values), "--json")
    assert done.code == 0, done.err
    first, second = (done.json["last"]["clients"][c] for c in "01")
    lines = answers(out, 1, (0,))
    hits = [line["option"] == line["reference"] for line in lines]
    assert {line["option"] for line in lines} <= {"yes", "no"}
    assert first["option_accuracy"] == pytest.approx(100 * sum(hits) / len(hits))
    assert "option_accuracy" not in second and all("option" not in line for line in answers(out, 1, (1,)))
    assert "option accuracy" in call("evaluate", out).out
    assert "option accuracy" in (out / "report.html").read_text()


def test_the_metric_needs_options(data: Path, tmp_path: Path) -> None:
    values = settings(tmp_path / "run", shared_model(), shared_data(), evaluation__metric="option_accuracy")
    assert "option_accuracy needs evaluation.options" in refused("run", write_yaml(tmp_path / "a.yaml", values))
    values = settings(tmp_path / "run", shared_model(), data, evaluation__metric="option_accuracy")
    values["evaluation"]["options"] = "mean"
    assert "no test row of client 1 lists OPTIONS" in refused("run", write_yaml(tmp_path / "b.yaml", values))
