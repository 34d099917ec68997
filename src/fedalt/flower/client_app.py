"""The ClientApp: hands a message on to the site's trainer. Its ``--node-config``: ``client-id=N state="DIR"``."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedalt.flower.messages import request_in, to_server
from fedalt.flower.requests import Reply, Request
from fedalt.flower.trainer import ask

app = ClientApp()


@app.query()
@app.train()
@app.evaluate()
def handle(message: Message, context: Context) -> Message:
    """Say who this is, or let the trainer answer."""
    node = context.node_config
    request = request_in(message)
    if request.do == "who":
        return to_server(Reply({"client": int(node["client-id"])}), message)
    return to_server(_asked(Path(str(node["state"])), request), message)


def _asked(state: Path, request: Request) -> Reply:
    try:
        return ask(state, request)
    except Exception as error:
        return Reply(error=f"{type(error).__name__}: {error}")
