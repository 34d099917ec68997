"""The ClientApp: hands a message on to the site's trainer and signs what it answers.

Its ``--node-config``: ``client-id=N state="DIR"``. What leaves the site leaves it here.
"""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedalt.files import read_json
from fedalt.flower.certs import PrivateKey, check_site_key
from fedalt.flower.inflate import SITE as SITE_INFLATES
from fedalt.flower.inflate import bound
from fedalt.flower.messages import request_in, to_server
from fedalt.flower.requests import Reply, Request, SiteError
from fedalt.flower.trainer import SITE, ask

bound(SITE_INFLATES)  # here, because a process that is to run a ClientApp imports it before it reads a message
app = ClientApp()
_log = logging.getLogger("flwr")


@app.query()
@app.train()
@app.evaluate()
def handle(message: Message, context: Context) -> Message:
    """Say who this is, or let the trainer answer; of what goes wrong only a code leaves the site."""
    client, state = int(context.node_config["client-id"]), Path(str(context.node_config["state"]))
    request, key = Request("who"), None
    try:
        key = _key(state)
        request = request_in(message)
        reply = Reply.to(request, client) if request.do == "who" else ask(state, request)
    except Exception as error:
        _log.error("%s: %s: %s", request.do, type(error).__name__, error)
        reply = Reply.failed(request, client, error if isinstance(error, SiteError) else SiteError("message"))
    return to_server(reply, message, key)


@cache
def _key(state: Path) -> PrivateKey | None:
    """This site's private key, if it has one."""
    path = read_json(state / SITE).get("key")
    return check_site_key(Path(path)) if path else None
