"""What goes to the hub, told by a hub of our own on loopback that keeps what it is sent."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from safetensors.torch import load

from micro import call, finished, refused


class Hub:
    """Repositories, and the files that were committed to them."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.place = ""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    known = Hub()

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({})

        def do_HEAD(self) -> None:
            self.answer({})

        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers["Content-Length"])).decode()
            if self.path == "/api/repos/create":
                known.made.append(json.loads(text))
                self.answer({"url": f"{known.place}/me/{known.made[-1]['name']}"})
            elif self.path.endswith("/preupload/main"):
                asked = json.loads(text)["files"]
                modes = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]
                self.answer({"files": modes})
            elif self.path.endswith("/commit/main"):
                for line in map(json.loads, text.splitlines()):
                    if line["key"] == "file":
                        known.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                self.answer({"commitUrl": f"{known.place}/me/mine/commit/1", "commitOid": "1"})
            else:
                self.answer({})

        def answer(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        known.place = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", known.place)
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield known
        server.shutdown()


@pytest.mark.parametrize("form", ["static", "merge"])
def test_a_model_goes_to_the_hub_with_its_card(hub: Hub, form: str) -> None:
    options = ["--merge"] if form == "merge" else []
    done = call("push", finished(), "--client", 1, "--repo", "me/mine", *options)
    assert done.code == 0, done.err
    assert f"pushed to {hub.place}/me/mine" in done.out
    assert [(one["name"], one["visibility"]) for one in hub.made] == [("mine", "private")]
    weights = "model.safetensors" if form == "merge" else "adapter_model.safetensors"
    assert load(hub.files[weights])
    card = hub.files["README.md"].decode()
    for part in ("personal model", "this model", "`fedalt`", "12 for training", f"--{form}"):
        assert part in card, part
    assert ("library_name: peft" in card) == (form == "static")


def test_a_hub_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = refused("push", finished(), "--client", 1, "--repo", "me/mine")
    assert line == "--repo: me/mine cannot be written: HF_HUB_OFFLINE is set"
