"""Runs that classify images: digits, a folder of images, newcomers, and one image asked about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from micro import call, farthest, refused, run_here, settings, shared_classifier, write_yaml


def values(out: Path, **changes: Any) -> dict[str, Any]:
    base = {
        "model__task": "image_classification",
        "data__clients": 4,
        "data__held_out": 1,
        "data__train_limit": 30,
        "data__test_limit": 10,
        "data__partition": {"by": "pathological", "classes_per_client": 3},
        "federation__rounds": 2,
        "training__local_epochs": 2,
        "training__lr": 2e-2,
    }
    return settings(out, shared_classifier("vit"), Path("digits"), **base | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vision") / "run"
    done = call("run", write_yaml(out.with_suffix(".yaml"), values(out)))
    assert done.code == 0, done.err
    return out


def test_clients_learn_their_classes(run: Path) -> None:
    scores = json.loads((run / "results/final_scores.json").read_text())
    assert scores["metric"] == "accuracy" and scores["last"]["mean"] > 50  # three of ten classes each
    assert "equal to the run's own scores" in call("evaluate", run).out


def test_executors_agree(tmp_path: Path) -> None:
    short = {"training__local_epochs": 1, "data__train_limit": 12}
    folders = [
        run_here(values(tmp_path / how, federation__executor=how, **short))[0].path for how in ("stacked", "loop")
    ]
    assert farthest(*folders) < 1e-4


@pytest.mark.parametrize("method", ["feddpa_t", "fdlora", "centralized"])
def test_methods_that_look_at_rows_look_at_images(method: str, tmp_path: Path) -> None:
    folder, _ = run_here(values(tmp_path / "run", method=method, fdlora__budget=9, data__train_limit=8))
    assert folder.final_scores.is_file()


def test_held_out_clients_join(run: Path) -> None:
    done = call("onboard", run, "--epochs", 4, "--json")
    assert done.code == 0 and list(done.json["clients"]) == ["3"]
    assert done.json["after"]["mean"] > done.json["before"]["mean"]


def test_static_export_and_insight(run: Path, tmp_path: Path) -> None:
    done = call("export", run, "--client", 0, "--to", tmp_path / "static", "--static")
    assert done.code == 0, done.err
    about = json.loads((tmp_path / "static/adapter_config.json").read_text())
    assert about["task_type"] is None and about["modules_to_save"] == ["classifier"]
    assert call("report", run, "--insight", 2).code == 0


def test_one_image_is_asked_about(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "seven.png"
    Image.fromarray(np.zeros((20, 20, 3), dtype=np.uint8)).save(file)
    done = call("generate", run, "--client", 1, file, "--show-alpha")
    assert done.code == 0 and done.out.split()[0] in "0123456789"
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    assert "broken.png" in refused("generate", run, "--client", 1, broken)
    assert "nowhere.png" in refused("generate", run, "--client", 1, tmp_path / "nowhere.png")


def test_images_need_the_task_and_texts_another(tmp_path: Path) -> None:
    texts = values(tmp_path / "a", model__task="sequence_classification", model__name=str(shared_classifier()))
    assert "rows with images are for model.task=image_classification" in refused(
        "run", write_yaml(tmp_path / "a.yaml", texts)
    )
    images = values(tmp_path / "b", data__source="tinyworld", data__tasks=["tiny_inference"], data__partition={})
    images["data"] |= {"clients": None, "held_out": 0}
    assert "rows without images" in refused("run", write_yaml(tmp_path / "b.yaml", images))
